"""The report on speculation judges what must hold by the figures in the result files."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speculation_exact import BATCHES, CACHES, LOOKAHEAD, PREDICTORS, merged
from benchmarks.speculation_report import (
    EXPECTED_RECALL,
    compile_claims,
    eval_claims,
    exact_claims,
    timing_claims,
)


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
