"""Families, policies, formats, batches and caches on 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.families import build, families
from tests.models.test_families import DYNAMIC, FAST
from tests.ranks.groups import (
    EXPERTS,
    LAYERS,
    Group,
    needs_expert_parallel,
    run_groups,
    save_checkpoint,
)

pytestmark = [pytest.mark.slow, needs_expert_parallel]

AHEAD = {"lowering": "eager", "prefetch": True}
WAYS: list[dict[str, Any]] = [
    {"name": "inductor", "load": {"expert_cache": "50%"}, "compile": {"prefetch": True}},
    {
        "name": "dynamic",
        "load": {"expert_cache": "50%"},
        "compile": AHEAD,
        "static": False,
        "batch": 3,
    },
    {"name": "ram", "load": {"store": "ram", "store_dir": None}, "batch": 4},
    {"name": "batch_2", "batch": 2},
    {"name": "as_it_comes", "load": {"expert_cache": "50%"}, "compile": {}},
    {"name": "four", "ranks": 4},
    {"name": "four_dynamic", "ranks": 4, "static": False, "batch": 2},
]
FORMATS = ("int8", "int4", "mxfp4", "fp8")
POLICIES: list[dict[str, Any]] = [
    {"policy": "default_vector", "default_vector_threshold": 0.3},
    {"policy": "commit"},
    {"policy": "commit", "commit_weights": "true"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 64 columns: what 4 bit in groups needs.
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_checkpoint(folder, hidden_size=64, moe_intermediate_size=64)


def groups_of(out: Path, checkpoint: Path, scenarios: list[dict[str, Any]]) -> dict[str, Group]:
    return run_groups(out, checkpoint, [{"ranks": 2, **each} for each in scenarios])


def test_tokens_are_the_plain_models(tmp_path: Path, checkpoint: Path) -> None:
    for name, group in groups_of(tmp_path, checkpoint, WAYS).items():
        for one in group.checked():
            assert one["tokens"] == one["expected"], name
            assert one["own"] == [EXPERTS // len(group.statuses)] * LAYERS, name


@pytest.mark.parametrize("name", FAST)
def test_a_family_gives_the_plain_tokens(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = tmp_path / "checkpoint"
    build(families()[name]).save_pretrained(checkpoint)
    scenario = {"name": name, "static": name not in DYNAMIC, "batch": 2, "new_tokens": 8}
    for one in groups_of(tmp_path, checkpoint, [scenario])[name].checked():
        assert one["tokens"] == one["expected"]
        assert not one["breaks"]


def test_quantised_experts_give_one_process_tokens(tmp_path: Path, checkpoint: Path) -> None:
    scenarios = [
        {"name": name, "load": {"quantize": name}, "reference": "one_rank"} for name in FORMATS
    ]
    for name, group in groups_of(tmp_path, checkpoint, scenarios).items():
        first, second = group.checked()
        assert first["tokens"] == second["tokens"] == first["expected"], name


def test_policies_give_every_rank_the_same_tokens(tmp_path: Path, checkpoint: Path) -> None:
    load = {"expert_cache": "50%"}
    scenarios = [
        {"name": f"policy{n}", "compile": {**options, "lowering": "eager"}, "load": load}
        for n, options in enumerate(POLICIES)
    ]
    for name, group in groups_of(tmp_path, checkpoint, scenarios).items():
        first, second = group.checked()
        assert first["tokens"] == second["tokens"], name
        assert first["stats_of_all"]["skipped_experts"] > 0, name


def test_each_rank_reads_half_of_the_bytes(tmp_path: Path, checkpoint: Path) -> None:
    scenario = {
        "name": "half",
        "compile": {"prefetch": False, "lowering": "eager"},
        "reference": "one_rank",
        "new_tokens": 40,
    }
    first, second = groups_of(tmp_path, checkpoint, [scenario])["half"].checked()
    one = first["stats_of_one"]
    assert first["stats_of_all"]["demand_bytes"] == one["demand_bytes"] > 0
    for rank in (first, second):
        assert 0.35 < rank["stats"]["demand_bytes"] / one["demand_bytes"] < 0.65
        assert rank["stats"]["store_bytes"] * 2 == one["store_bytes"]
