"""The simulation of cache policies: its sums, its C++ and its report."""

from __future__ import annotations

import random
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.simulation import (
    eviction,
    eviction_budgets,
    eviction_prompts,
    eviction_trials,
    fast_replay,
)
from benchmarks.simulation.eviction_report import write_report
from benchmarks.simulation.eviction_trials import hit_counts
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


def test_slots_go_where_they_add_most_hits() -> None:
    gains = [[10, 20, 25, 26], [0, 7, 13, 18], [50, 50, 50, 50]]
    assert eviction_budgets.share_slots(gains, 4, 12) == [4, 4, 4]
    assert eviction_budgets.share_slots(gains, 4, 15) == [5, 6, 4]
    assert eviction_budgets.share_slots(gains, 4, 17) == [6, 7, 4]
    assert eviction_budgets.share_slots(gains, 4, 21) == [7, 7, 7]


def test_budgets_are_learned_on_first_halves_and_measured_on_second() -> None:
    many, few = uneven_choices(0), [[0, 1, 2, 3]] * 300
    streams = {"python": [many, few], "joined": [few, many]}
    with Pool(1) as pool:
        rows = eviction_budgets.try_budgets(streams, 32, {"lru": {"policy": "lru"}}, pool)
    found = {(row["slots"], row["learned_on"]): row["points"] for row in rows}
    late = {
        slots: sum(fast_replay.hits(many, 32, slots, policy="lru")[150:]) for slots in (4, 8, 12)
    }
    gained = 100 * (late[12] - late[8]) / (2 * 150 * 4)
    assert found[8, "own"] == {"python": pytest.approx(gained), "joined": pytest.approx(gained)}
    lost = 100 * (late[4] - late[8]) / (2 * 150 * 4)
    assert found[8, "joined"] == {"python": pytest.approx(lost)}
    assert gained > 1 and lost < -1


def test_counts_of_probabilities_are_those_of_choices_where_all_is_chosen() -> None:
    streams = np.array([uneven_choices(seed) for seed in range(2)])
    rules = {rule.name: rule for rule in eviction_trials.LIKELY_RULES}
    slots = np.array([8, 8, 16, 16])
    chosen = np.zeros((2, streams.shape[1], 32), np.float32)
    np.put_along_axis(chosen, streams, 1, axis=2)
    doubled = np.tile(streams, (2, 1, 1))
    of_choices = hit_counts(doubled, slots, rules["choices, 0.95 a token"])
    likely = rules["probabilities, 0.95 a token"]
    assert (hit_counts(doubled, slots, likely, chosen) == of_choices).all()
    backwards = hit_counts(doubled, slots, likely, 1 - chosen)
    assert (backwards < of_choices).all() and (backwards > 0).all()


def uneven_choices(seed: int) -> list[list[int]]:
    weights = np.array([1 / (1 + rank) for rank in range(32)])
    rng = np.random.default_rng(seed)
    return [
        rng.choice(32, 4, replace=False, p=weights / weights.sum()).tolist() for _ in range(300)
    ]


def budget(source: str, mean: float, worst: float) -> dict[str, Any]:
    return {
        "policy": "lru",
        "slots": 8,
        "learned_on": source,
        "mean_points": mean,
        "worst_points": worst,
    }


def after_prompts() -> dict[str, Any]:
    kinds = (*eviction_prompts.COUNTED, *eviction_prompts.ON_A_GPU, *eviction_prompts.OF_LFU)
    hits = {kind: {"prose": 50.0 + n, "chat": 49.0 + n} for n, kind in enumerate(kinds)}
    return {"start": "empty", "prompt": 64, "slots": 8, "hits": hits}


def test_what_a_prompt_says_is_counted_by_text() -> None:
    """One text of a conversation, one of which every prompt leaves the wrong experts."""
    length = max(eviction_prompts.PROMPTS) + eviction_prompts.LOOKED_AT
    choices = uneven_choices(1) + uneven_choices(2)
    steady = torch.tensor(choices[:length], dtype=torch.int16)
    turned = torch.cat([31 - steady[:64], steady[64:]])
    with Pool(1) as pool:
        found = eviction_prompts.try_prompts(
            {"steady": steady[None], "turned": turned[None], "joined": steady[None]}, pool
        )
    rows = {(row["start"], row["prompt"], row["slots"]): row["hits"] for row in found["rows"]}
    of_eight = rows["empty", 64, 8]
    for kind in ("last tokens", "all, judged", "last tokens, gpu"):
        base = of_eight["nothing, gpu" if kind.endswith("gpu") else "one step"]
        assert of_eight[kind]["steady"] > base["steady"] + 0.5, kind
        assert of_eight[kind]["turned"] < base["turned"] - 0.5, kind
    assert of_eight["last tokens, lfu"] != of_eight["one step, lfu"]
    # Alone a conversation finds the same cache in turn as empty.
    assert rows["in turn", 64, 8]["last tokens"]["steady"] == of_eight["last tokens"]["steady"]


def test_report_says_whether_the_marks_are_met(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(text, slots) for slots in (8, 16) for text in ("prose", "joined")]
    result: dict[str, Any] = {
        "commit": "0123456789abcdef",
        "tokens": {"prose": 5000, "joined": 5000},
        "rows": rows,
        "batch": {"tokens": 4, "rows": rows},
        "seeding": {"commit": "fedcba9876543210", "rows": [after_prompts()]},
        "trial_tokens": 1000,
        "trials": [
            {"rule": "r", "mean_of_ways": 0.5, "by_slots": {"8": 0.5}, "worst_against_lru": 0.0}
        ],
        "more": {
            "commit": "fedcba9876543210",
            "trial_tokens": 1000,
            "budgets": [budget("own", 1.25, -0.5), budget("joined", 0.75, -2.0)],
            "probabilities": [
                {
                    "rule": "p",
                    "hits": {"8": 61.0},
                    "least_against_adaptive": -1.0,
                    "most_against_adaptive": 0.5,
                }
            ],
        },
    }
    path = tmp_path / "eviction.md"
    assert write_report({**result, "summary": eviction.summary(rows)}, path)
    text = path.read_text()
    assert "70.0 %" in text and "| 8 | prose | 50.0 |" in text
    assert "| lru | 8 | +1.25 (-0.50) | +0.75 (-2.00) |" in text
    assert "| p | 61.0 | -1.0 to +0.5 |" in text
    assert "| empty | 64 | 8 | 49.5 | 50.5 | 51.5 | 52.5 | +1.0 to +1.0 | 53.5 |" in text
    assert "which would gain +1.00 points" in text.replace("\n", " ")
    assert text.count("as the documents were then; commit: fedcba987654") == 2
    assert (tmp_path / "eviction.png").stat().st_size > 1000
    worse = [row(text, 8, adaptive=53.0) for text in ("prose", "joined")]
    assert not write_report({**result, "summary": eviction.summary(worse)}, path)
