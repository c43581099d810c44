"""The simulation of cache policies: its sums, its C++ and its report."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulation import eviction, fast_replay
from benchmarks.simulation.eviction_report import write_report
from specmoe_compile.runtime.cache.slot_table import belady_hits


def row(text: str, slots: int, **changes: float) -> dict[str, Any]:
    rates = {"lru": 50.0, "lfu": 56.0, "kept": 55.0, "adaptive": 57.0, "belady": 60.0}
    found: dict[str, Any] = {
        "text": text,
        "slots": slots,
        **rates,
        "belady_bypass": 64.0,
        **changes,
    }
    if text == "joined":
        found |= {f"{arm}_after_change": found[arm] for arm in eviction.ARMS}
    return found


def test_ways_are_means_of_rows_where_there_is_one() -> None:
    nowhere = row("prose", 4, belady=50.0, lfu=50.0, kept=50.0, adaptive=57.0)
    found = eviction.summary([row("prose", 8), row("joined", 8, adaptive=55.0), nowhere])
    assert found["way_to_belady"]["adaptive"] == pytest.approx((0.7 + 0.5) / 2)
    assert found["way_to_belady_bypass"]["adaptive"] == pytest.approx((0.5 + 5 / 14 + 0.5) / 3)
    assert found["summed_way_to_belady"]["kept"] == pytest.approx(0.5)
    assert found["worst_adaptive_against_lru"] == pytest.approx(5.0)
    assert found["worst_adaptive_after_change"] == pytest.approx(5.0)


def uneven_stream() -> list[list[int]]:
    rng = random.Random(0)
    weights = [1 / (1 + rank) for rank in range(32)]
    return [list(dict.fromkeys(rng.choices(range(32), weights, k=5))) for _ in range(300)]


@pytest.mark.parametrize("arm", eviction.ARMS)
def test_hits_in_cpp_are_those_of_python(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = uneven_stream()
    native = fast_replay.hits(stream, 32, 8, **eviction.ARMS[arm])
    monkeypatch.setattr(fast_replay, "library_or_none", lambda: None)
    assert fast_replay.hits(stream, 32, 8, **eviction.ARMS[arm]) == native
    assert sum(native) > 300


@pytest.mark.parametrize("may_bypass", [False, True])
@pytest.mark.parametrize("slots", [3, 5, 8, 31])
def test_belady_in_cpp_is_that_of_the_package(may_bypass: bool, slots: int) -> None:
    stream = uneven_stream()
    got = fast_replay.best_hits(stream, 32, slots, may_bypass=may_bypass)
    assert got == belady_hits(stream, slots, may_bypass=may_bypass)


def test_report_says_whether_the_marks_are_met(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(text, slots) for slots in (8, 16) for text in ("prose", "joined")]
    result: dict[str, Any] = {
        "commit": "0123456789abcdef",
        "tokens": {"prose": 5000, "joined": 5000},
        "rows": rows,
        "batch": {"tokens": 4, "rows": rows},
        "seeding": [{"slots": 8, "nothing": 1.0, "one step": 2.0, "each token": 3.0}],
        "trial_tokens": 1000,
        "trials": [
            {"rule": "r", "mean_of_ways": 0.5, "by_slots": {"8": 0.5}, "worst_against_lru": 0.0}
        ],
    }
    path = tmp_path / "eviction.md"
    assert write_report({**result, "summary": eviction.summary(rows)}, path)
    text = path.read_text()
    assert "70.0 %" in text and "| 8 | prose | 50.0 |" in text
    assert (tmp_path / "eviction.png").stat().st_size > 1000
    worse = [row(text, 8, adaptive=53.0) for text in ("prose", "joined")]
    assert not write_report({**result, "summary": eviction.summary(worse)}, path)
