"""Several processes that share a model's experts, started by torchrun, on the CPU with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS, TOP_K = 3, 8, 2
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def start(
    folder: Path, checkpoint: Path, ranks: int, **options: Any
) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), str(WORKER), str(checkpoint), str(folder / "store"), str(folder),
        json.dumps(options),
    ]  # fmt: skip
    root = str(WORKER.parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def seen(folder: Path, checkpoint: Path, ranks: int, **options: Any) -> list[dict[str, Any]]:
    ended = start(folder, checkpoint, ranks, **options)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def test_two_ranks_give_the_plain_tokens_from_one_store(tmp_path: Path, checkpoint: Path) -> None:
    found = seen(tmp_path, checkpoint, 2, compile={"lowering": "eager"})
    for rank, one in enumerate(found):
        assert one["tokens"] == one["expected"], "tokens differ from the plain model's"
        assert not one["breaks"]
        assert len(one["sums"]) >= 1 and all(count >= LAYERS for count in one["sums"])
        assert one["own"] == [EXPERTS // 2] * LAYERS
        experts = {expert for _, expert in one["reads"]}
        assert experts and experts <= set(range(rank * 4, rank * 4 + 4)), "reads only its own"
        assert sum(layer["predicted"] for layer in one["stats"]["layers"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"expert_cache": "50%"},
        {"static": False, "batch": 3, "expert_cache": "50%"},
        {"store": "ram", "batch": 4},
        {"expert_cache": "50%", "compile": {"prefetch": False}},
    ],
    ids=["inductor", "dynamic", "ram", "no_prefetch"],
)
def test_tokens_for(options: dict[str, Any], tmp_path: Path, checkpoint: Path) -> None:
    for one in seen(tmp_path, checkpoint, 2, **options):
        assert one["tokens"] == one["expected"]


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, checkpoint: Path) -> None:
    for one in seen(tmp_path, checkpoint, 4):
        assert one["tokens"] == one["expected"]
        assert one["own"] == [EXPERTS // 4] * LAYERS


@pytest.mark.slow
def test_an_uneven_split_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    ended = start(tmp_path, checkpoint, 3)
    assert ended.returncode != 0
    assert "processes as divide the experts" in ended.stderr
