"""Two GPUs: experts split over ranks with NCCL, the sums over ranks inside CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.groups import EXPERTS, LAYERS, WORKER, save_checkpoint, torchrun

FOUND = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(FOUND < 2, reason=f"needs two CUDA devices, and PyTorch sees {FOUND}"),
]


def test_sums_over_two_gpus_are_inside_cuda_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    scenario: dict[str, Any] = {
        "checkpoint": str(save_checkpoint(folder, hidden_size=64, moe_intermediate_size=64)),
        "store_dir": None,
        "load": {"device": "cuda", "store": "ram", "expert_cache": "50%"},
        "compile": {"prefetch": True, "mode": "reduce-overhead"},
        "new_tokens": 24,
    }
    ended = torchrun(2, WORKER, json.dumps(scenario), str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-6000:]
    for rank in range(2):
        one = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert one["tokens"] == one["expected"], "tokens differ from the plain model's"
        assert not one["breaks"] and one["cudagraph_skips"] == 0
        assert one["sums"] and all(count >= LAYERS for count in one["sums"])
        assert one["own"] == [EXPERTS // 2] * LAYERS
        assert one["stats"]["misses"] > 0
