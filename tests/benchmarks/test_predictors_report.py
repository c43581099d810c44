"""The document on predictors: figures come from the result, and what was not measured says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predictors.report import mean, write_report
from specmoe_compile.predict.registry import PREDICTORS

ABOUT: dict[str, Any] = {
    "commit": "0123456789abcdef0123",
    "machine": {"cpu": "a processor", "cores": 2, "ram_bytes": 1 << 30, "gpu": None},
    "versions": {"torch": "2.13.0", "triton": None},
}


def _seen(network_layers: list[int]) -> dict[str, Any]:
    return {
        "recall": [None, 0.5, 0.7],
        "whole": [None, 0.1, 0.3],
        "network_layers": network_layers,
        "default_vector_parameters": 64,
        "network_parameters": 0,
        "training_tokens": 0,
        "epochs": 0,
        "training_s": 0.0,
    }


def _result() -> dict[str, Any]:
    recall = {
        "tokens": 1024,
        "held_out_tokens": 512,
        "held_out_files": ["heapq.py"],
        "window": 32,
        "seed": 0,
        "top_k": 4,
        "predictors": {name: _seen([1] if name == "hybrid" else []) for name in PREDICTORS},
    }
    names = [name for name in PREDICTORS if name != "hybrid"]
    us = {name: {"p20": 1.0, "p50": 20.0 if name == "estimator" else 10.0} for name in names}
    return {
        "schema": 1,
        "recall": {**ABOUT, **recall},
        "cost": {**ABOUT, "layers": 2, "us_per_token": us},
    }


def test_document_shows_means_and_says_what_was_not_measured(tmp_path: Path) -> None:
    result, document = tmp_path / "r.json", tmp_path / "r.md"
    result.write_text(json.dumps(_result()))
    write_report(result, document)
    text = document.read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for name in PREDICTORS:
        row = next(line for head, line in rows.items() if head.startswith(f"`{name}`"))
        assert "0.500" in row or "0.600" in row
    head, _, rest = text.partition("## Recall by layer")
    all_rows = "\n".join(line for line in head.splitlines() if line.startswith("| `"))
    assert "`default_vectors`'s, 0.600 against 0.600" in head and "By time" not in head
    assert all_rows.count("0.600") == len(PREDICTORS) and all_rows.count("0.200") == len(PREDICTORS)
    assert "not measured" in all_rows and "15 us (computed)" in all_rows
    assert "ms/token of each run" not in rest


def test_missing_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the phase recall first"):
        write_report(tmp_path / "none.json", tmp_path / "r.md")


def test_mean_leaves_the_first_layer_out() -> None:
    assert mean([0.9, None, 0.5, 0.7]) == pytest.approx(0.6)


def _timing(faster: float, samples: list[float]) -> dict[str, Any]:
    """`residual` takes so many times what the others take."""
    total = {"steps": 6, "demand_bytes": 0, "speculative_bytes": 0, "stall_ms": 0.0}
    total["useful_speculative_bytes"] = 0

    def arm(factor: float) -> dict[str, Any]:
        runs = [[factor * ms for ms in samples], [2.0 * ms for ms in samples]]
        spread = {"p20": 1.0, "p50": 10.0, "p80": 20.0}
        rest = {"recall": None, "predicted_share": 0.0, "total": total}
        return {"tpot_ms": spread, "medians_ms": [1.0, 2.0], "samples_ms": runs, **rest}

    return {
        **ABOUT,
        "model": {"moe_layers": 2, "expert_bytes": 10},
        "expert_cache": None,
        "auto_off": True,
        "prompts": 1,
        "new_tokens": 3,
        "repeats": 2,
        "different_token_lists": 0,
        "arms": {n: arm(faster if n == "residual" else 1.0) for n in ("none", *PREDICTORS)},
    }


@pytest.mark.parametrize(
    ("faster", "said"),
    [
        (
            0.9,
            "without a cache, `residual` takes 0.950 of its time in the median of 2 repeats, and",
        ),
        (0.9, "is faster in 1 of 2: not told apart"),
        (1.1, "By time, without a cache, none of the others is faster in the median of 2 repeats."),
    ],
)
def test_who_is_faster_is_said_token_by_token(tmp_path: Path, faster: float, said: str) -> None:
    result, document = tmp_path / "r.json", tmp_path / "r.md"
    found = {**_result(), "no_cache": _timing(faster, [5.0, 50.0, 500.0])}
    result.write_text(json.dumps(found))
    write_report(result, document)
    text = document.read_text()
    assert said in text
    assert "## When used, without a cache, `auto_off` as by default" in text


def test_a_result_without_single_tokens_is_shown_without_a_verdict(tmp_path: Path) -> None:
    result, document = tmp_path / "r.json", tmp_path / "r.md"
    found = {**_result(), "timing": _timing(0.9, [5.0])}
    for arm in found["timing"]["arms"].values():
        del arm["samples_ms"]
    result.write_text(json.dumps(found))
    write_report(result, document)
    assert "2 repeats that kept no single tokens" in document.read_text()


def test_one_network_under_two_names_does_not_compete_with_itself(tmp_path: Path) -> None:
    result, document = tmp_path / "r.json", tmp_path / "r.md"
    found = {**_result(), "no_cache": _timing(1.0, [5.0])}
    for name in ("estimator", "hybrid"):
        found["recall"]["predictors"][name]["network_parameters"] = 7
    found["no_cache"]["arms"]["estimator"]["samples_ms"] = [[4.0], [9.0]]
    result.write_text(json.dumps(found))
    write_report(result, document)
    text = document.read_text()
    assert "`estimator` is the same network in every layer here: that it takes 0.850 of" in text
    assert "`estimator` takes" not in text
