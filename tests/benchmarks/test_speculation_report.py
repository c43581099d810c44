"""The report on speculation judges what must hold by the figures in the result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.speculation.exact import BATCHES, CACHES, LOOKAHEAD, PREDICTORS, merged
from benchmarks.speculation.report import (
    EXPECTED_RECALL,
    compile_claims,
    eval_claims,
    exact_claims,
    write_report,
)
from benchmarks.speculation.report_paired import paired_claims
from benchmarks.speculation.report_timing import timing_claims
from benchmarks.speculation.run import medians_by_token


def _exact() -> dict[str, Any]:
    rows = [
        {
            "batch": batch,
            "kv_cache": cache,
            "predictor": kind or LOOKAHEAD,
            "tokens": 4096,
            "differing_tokens": 0,
            "prefetches": 0 if kind == "empty" else 40000,
        }
        for batch in BATCHES
        for cache in CACHES
        for kind in PREDICTORS
    ]
    return {"model": {"bytes_per_expert": 3 << 20}, "rows": rows}


def test_exact_needs_every_token_of_every_run() -> None:
    (claim,) = exact_claims(_exact())
    assert claim.holds
    found = _exact()
    found["rows"][3]["differing_tokens"] = 1
    assert not exact_claims(found)[0].holds
    found = _exact()
    found["rows"][0]["prefetches"] = 0
    (claim,) = exact_claims(found)
    assert not claim.holds and "nothing was prefetched" in claim.measured
    found = _exact()
    gone = found["rows"].pop()
    (claim,) = exact_claims(found)
    assert not claim.holds
    assert f"not run: batch {gone['batch']} {gone['kv_cache']}" in claim.measured


def test_rows_of_a_second_run_join_those_of_the_first() -> None:
    kept = {**_exact(), "commit": "old", "store_filesystem": "tmpfs"}
    new = [{**row, "differing_tokens": 1} for row in _exact()["rows"] if row["batch"] == 4]
    found = merged(kept, {"rows": new, "store_filesystem": "ext4"}, "new")
    assert len(found["rows"]) == len(kept["rows"])
    marks = {(row["batch"], row["commit"], row["store_filesystem"]) for row in found["rows"]}
    assert marks == {(1, "old", "tmpfs"), (4, "new", "ext4")}
    assert not exact_claims(found)[0].holds


def _timing(**p50: float) -> dict[str, Any]:
    times = {"on_demand": 40.0, "prefetch": 35.0, "resident": 5.0, "cache 25%": 20.0}
    times |= {"specmoe 25%": 20.0, "cache 50%": 10.0, "specmoe 50%": 10.2, **p50}
    return {"arms": [{"name": name, "tpot_ms": {"p50": ms}} for name, ms in times.items()]}


_SETTINGS = ("prompts", "prompt_tokens", "new_tokens", "repeats", "order")
_ABOUT = {
    "model": {
        "moe_layers": 8,
        "bytes_per_expert": 3_000_000,
        "experts": [32],
        "top_k": 4,
        "expert_bytes": 1,
    },
    "machine": {"cpu": "x", "cores": 2, "ram_bytes": 1, "gpu": None},
    "versions": {},
    "commit": "abc",
}


@pytest.mark.parametrize(
    ("p50", "holds"),
    [
        ({}, [True, True, True]),
        ({"prefetch": 36.1}, [False, True, True]),
        ({"specmoe 25%": 20.5}, [True, False, True]),
        ({"specmoe 50%": 10.3}, [True, True, False]),
    ],
)
def test_timing_is_judged_by_medians(p50: dict[str, float], holds: list[bool]) -> None:
    assert [claim.holds for claim in timing_claims(_timing(**p50))] == holds


def _paired(**medians: float) -> dict[str, Any]:
    """A result of phase paired; every second turn takes twice as long, whatever the arm."""

    def arms(**ms: float) -> dict[str, Any]:
        total = {"steps": 80, "hits": 300, "misses": 20, "demand_bytes": 10 << 20, "needed": 160}
        total |= {"speculative_bytes": 4 << 20, "useful_speculative_bytes": 3 << 20}
        total |= {"pushed_out_bytes": 10 << 20, "stall_ms": 50.0}
        return {
            "different_token_lists": 0,
            "arms": {
                name.replace("_again", " again"): {
                    "tpot_ms": {"p50": medians.get(name, value)},
                    "turns_ms": [medians.get(name, value), 2.0 * medians.get(name, value)],
                    "totals": [total],
                }
                for name, value in ms.items()
            },
        }

    return {
        **_ABOUT,
        "groups": {
            "no cache": arms(on_demand=40.0, prefetch=35.0, on_demand_again=40.0, resident=5.0),
            "25%": arms(cache=20.0, specmoe=20.0, cache_again=20.0),
            "50%": arms(cache=10.0, specmoe=10.0, cache_again=10.0),
        },
        "settings": {"prompts": 1, "prompt_tokens": 1, "new_tokens": 1, "rounds": 2},
    }


@pytest.mark.parametrize(
    ("medians", "holds"),
    [
        ({}, [True, True, True]),
        ({"prefetch": 36.1}, [False, True, True]),
        ({"specmoe": 20.5}, [True, False, False]),
        ({"specmoe": 10.1}, [True, True, True]),
    ],
)
def test_arms_in_turns_are_compared_turn_by_turn(
    medians: dict[str, float], holds: list[bool]
) -> None:
    assert [claim.holds for claim in paired_claims(_paired(**medians))] == holds


def test_time_is_judged_by_arms_in_turns_where_there_are_any(tmp_path: Path) -> None:
    slow = {**_full_timing(), "commit": "slow"}
    next(a for a in slow["arms"] if a["name"] == "specmoe 50%")["tpot_ms"]["p50"] = 99.0
    assert not write_report({"timing": slow}, tmp_path / "report.md")
    assert write_report({"timing": slow, "paired": _paired()}, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| 25% | cache | 20.0 | - | 1.0 MiB |" in text
    assert "1.000 +- 0.000 x (the same arm twice: 1.000 +- 0.000)" in text


def _eval(*curve: tuple[float, float], recall: float = 0.0) -> dict[str, Any]:
    exact = {"policy": "exact", "name": "exact", "bytes_per_token": 100, "loss_increase_nats": 0.0}
    rows = [
        {
            "policy": "default_vector",
            "name": f"default_vector {place}",
            "bytes_per_token": read,
            "loss_increase_nats": loss,
        }
        for place, (read, loss) in enumerate(curve)
    ]
    layers = [{"recall": None}, *({"recall": value + recall} for value in EXPECTED_RECALL)]
    model = {"bytes_per_expert": 3 << 20}
    return {"policies": [exact, *rows], "layers": layers, "model": model}


def test_default_vector_is_judged_by_its_best_threshold() -> None:
    _, claim = eval_claims(_eval((80, 0.001), (69, 0.019), (40, 0.5)))
    assert claim.holds and claim.measured.startswith("default_vector 1: 31 % fewer")
    assert not eval_claims(_eval((80, 0.001), (69, 0.021)))[1].holds
    assert not eval_claims(_eval((60, 0.021)))[1].holds


def test_recall_may_be_a_little_below() -> None:
    assert eval_claims(_eval((60, 0.0), recall=-0.019))[0].holds
    assert not eval_claims(_eval((60, 0.0), recall=-0.021))[0].holds


def test_compile_time_is_judged_with_and_without_the_compilers_share() -> None:
    found = {"pairs": [{"without_s": 10.0, "with_s": 12.0, "passes_s": 1.0}] * 3}
    assert [claim.holds for claim in compile_claims(found)] == [True, False]


def _full_timing() -> dict[str, Any]:
    """A result of phase timing with all that the report prints."""

    def total(stall_ms: float, read_bytes: int) -> dict[str, float]:
        counted = {"steps": 80, "hits": 300, "misses": 20, "demand_bytes": read_bytes}
        return {
            **counted,
            "speculative_bytes": 0,
            "useful_speculative_bytes": 0,
            "needed": 0,
            "stall_ms": stall_ms,
            "read_busy_ms": read_bytes / 2e6,
        }

    timing = {**_timing(), **_ABOUT, "settings": dict.fromkeys(_SETTINGS, 1)}
    for arm in timing["arms"]:
        arm["medians_ms"] = [arm["tpot_ms"]["p50"]]
        slow = arm["name"].startswith("cache")
        arm["totals"] = [total(20.0 if slow else 10.0, 10 << 20 if slow else 20 << 20)]
    return timing


def test_the_report_accounts_for_the_time_of_each_cache_size(tmp_path: Path) -> None:
    write_report({"timing": _full_timing()}, tmp_path / "report.md")
    (line,) = (x for x in (tmp_path / "report.md").read_text().splitlines() if "Cache of 50" in x)
    assert "+1.0 MiB per token and the waits by -1.0 ms; the median token by +0.2 ms" in line
    assert "changes it by +1.2 ms" in line
    assert "1.5 ms at 2.00 GB/s, the window before a layer is 0.6 ms" in line


def test_a_disturbed_repeat_does_not_move_a_token() -> None:
    repeats = [[10.0, 30.0, 11.0], [50.0, 31.0, 90.0], [12.0, 29.0, 13.0]]
    assert medians_by_token(repeats) == [12.0, 30.0, 13.0]
