"""Two GPUs: experts split over ranks, the sums over ranks inside CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.groups import EXPERTS, LAYERS, SUM_WORKER, WORKER, save_checkpoint, torchrun

FOUND = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(FOUND < 2, reason=f"needs two CUDA devices, and PyTorch sees {FOUND}"),
]


def on_two_gpus(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """What two ranks wrote of a script's run."""
    ended = torchrun(2, *arguments)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("sums", "slots"), [("all_reduce", "50%"), ("one_shot", "50%"), ("one_shot", "100%")]
)
def test_sums_over_two_gpus_are_inside_cuda_graphs(sums: str, slots: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    scenario: dict[str, Any] = {
        "checkpoint": str(save_checkpoint(folder, hidden_size=64, moe_intermediate_size=64)),
        "store_dir": None,
        "load": {"device": "cuda", "store": "ram", "expert_cache": slots},
        "compile": {"prefetch": True, "mode": "reduce-overhead", "sums": sums},
        "new_tokens": 24,
    }
    for one in on_two_gpus(tmp_path, WORKER, json.dumps(scenario), str(tmp_path)):
        assert one["tokens"] == one["expected"], "tokens differ from the plain model's"
        assert not one["breaks"] and one["cudagraph_skips"] == 0
        assert one["sums"] and all(count >= LAYERS for count in one["sums"])
        assert one["own"] == [EXPERTS // 2] * LAYERS
        assert (one["stats"]["misses"] > 0) == (slots == "50%") and one["stats"]["hits"] > 0
        reasons = list(one["inboxes"].values())
        if sums == "one_shot" and any(reasons):
            pytest.skip(f"these GPUs cannot add up in one shot: {reasons}")
        assert reasons == ([None] if sums == "one_shot" else [])
        assert (one["one_shot"] >= LAYERS) == (sums == "one_shot")


def test_sums_in_one_shot_are_those_of_nccl_to_the_bit(tmp_path: Path) -> None:
    first, second = on_two_gpus(tmp_path, SUM_WORKER, str(tmp_path))
    if first["reason"] is not None:
        pytest.skip(f"these GPUs cannot add up in one shot: {first['reason']}")
    for one in (first, second):
        assert one["sums"] >= 1000
        assert (one["off_nccl"], one["off_again"], one["off_reference"]) == (0, 0, 0)
    assert first["sha256"] == second["sha256"], "both ranks have the same bits"
