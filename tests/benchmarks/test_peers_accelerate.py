"""Rows of Hugging Face with accelerate, dry: a tiny model on the CPU, hooks and all."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.full_size import accelerate_peer
from benchmarks.full_size.accelerate_peer import build, device_map, expert_bytes
from benchmarks.full_size.model import SHAPES


def test_each_placement_has_a_row_and_is_measured_once(tmp_path: Path) -> None:
    out = tmp_path / "accelerate.jsonl"
    call = ["--dry", "--out", str(out)]
    assert accelerate_peer.main(call) == 0
    rows = {row["arm"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["resident", "device_map_50", "device_map_25"]
    whole = rows["resident"]["cache_bytes"]
    # Whole layers: of three, one stays with half of the bytes, and none with a quarter.
    assert [row["cache_bytes"] for row in rows.values()] == [whole, whole // 3, 0]
    assert [row["tokens"] for row in rows.values()] == [48, 8, 8]
    assert all(row["tpot_ms"]["p20"] <= row["tpot_ms"]["p80"] for row in rows.values())
    assert all(row["ttft_ms"] > 0 and row["routing"] == "own" for row in rows.values())
    written = out.read_bytes()
    assert accelerate_peer.main(call) == 0 and out.read_bytes() == written


def test_accelerate_has_room_for_the_share_of_the_experts_and_no_more() -> None:
    model = build(SHAPES["tiny-qwen3"], torch.device("cpu"), 6)
    whole = expert_bytes(model)
    assert whole == 6 * 64 * 3 * 64 * 32 * 4
    for share in (50, 25):
        places = device_map(model, share, ("cpu", "disk"))
        held = sum(
            expert_bytes(model.get_submodule(name)) for name, to in places.items() if to == "cpu"
        )
        assert whole * share / 100 - whole / 6 <= held <= whole * share / 100 + 1


def test_a_packed_shape_is_refused(tmp_path: Path) -> None:
    call = ["--dry", "--out", str(tmp_path / "o"), "--model", "tiny-qwen3-nvfp4"]
    assert accelerate_peer.main(call) == 2
