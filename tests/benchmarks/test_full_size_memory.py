"""Slots that a GPU's memory leaves, and the near-uniform routing."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.full_size.arms import ARMS, sharing_groups
from benchmarks.full_size.memory import attended_bytes, other_bytes, slots_in_memory
from benchmarks.full_size.model import SHAPES
from benchmarks.full_size.trace import PREDICTED, TRUE, near_uniform_tables
from benchmarks.kit.places import RESULTS


def test_slots_are_whole_and_at_most_all_experts() -> None:
    sizes = {"experts": 32, "top_k": 4}
    assert slots_in_memory(999, 100, **sizes) == 9
    assert slots_in_memory(10_000, 100, **sizes) == 32
    for left in (399, -5):
        with pytest.raises(ValueError, match="a token takes 4"):
            slots_in_memory(left, 100, **sizes)


@pytest.mark.parametrize(("name", "layer_bytes"), [("Qwen3-30B-A3B", 1_207_959_552)])
def test_what_else_a_run_takes_is_near_what_was_measured(name: str, layer_bytes: int) -> None:
    rows = json.loads((RESULTS / "peers_gpu.json").read_text(encoding="utf-8"))["rows"]
    found = 0
    for row in rows:
        # With all experts in their slots a prompt needs no buffers.
        if row["system"] != "specmoe" or row["format"] != "bf16" or row["arm"] == "resident":
            continue
        guess = other_bytes(SHAPES[name], row["context"], layer_bytes)
        measured = row["gpu_bytes"] - row["cache_bytes"]
        # PyTorch does not count the driver's own memory, about half a gigabyte.
        assert measured < guess < measured + 2e9, (row["arm"], row["context"], measured, guess)
        found += 1
    assert found >= 4


def test_sliding_windows_keep_their_length() -> None:
    config = SHAPES["GPT-OSS-20B"].configured()
    head = 2 * 8 * 64 * 2
    assert attended_bytes(config, 65536, 2) == 12 * (65536 + 128) * head
    assert attended_bytes(config, 100, 2) == 24 * 100 * head


def test_an_arm_of_a_card_has_a_graph_of_its_own_where_all_experts_fit() -> None:
    slots = {"cache_8gb": 20, "cache_16gb": 64, "cache_25": 32}
    names = list(slots)
    sizes = {"experts": 64, "top_k": 4, "slots_of": lambda arm: slots[name_of(arm)]}
    assert sharing_groups(names, "graph", **sizes) == [["cache_8gb", "cache_25"], ["cache_16gb"]]


def name_of(arm: object) -> str:
    return next(name for name, known in ARMS.items() if known is arm)


def test_the_near_uniform_routing_is_the_one_that_other_systems_have() -> None:
    tables = near_uniform_tables(48, 122, 128, 8)
    chosen = tables.topk(8, dim=-1).indices
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(48, 1, 128, generator=generator)
    noise = torch.randn(48, 122, 128, generator=generator)
    assert torch.equal(chosen[:, :, TRUE], (0.5 * base + noise).topk(8, dim=-1).indices)
    used = [layer.unique().numel() for layer in chosen[:, :, TRUE]]
    assert min(used) > 100, "nearly all experts are chosen at some time"
    assert (chosen[:, :1, PREDICTED] == chosen[:, :, PREDICTED]).all()
    small = near_uniform_tables(24, 9, 32, 4)
    assert small.shape == (24, 9, 2, 32)
    with pytest.raises(ValueError, match="take fewer"):
        near_uniform_tables(48, 123, 128, 8)
