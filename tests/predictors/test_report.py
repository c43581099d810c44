"""The document on predictors: figures come from the result, and what was not measured says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predictors_report import mean, write_report
from specmoe_compile.predictors.registry import PREDICTORS

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
    assert "`default_vectors`'s, 0.600 against 0.600" in head and "ms." not in head
    assert all_rows.count("0.600") == len(PREDICTORS) and all_rows.count("0.200") == len(PREDICTORS)
    assert "not measured" in all_rows and "15 us (computed)" in all_rows
    assert "ms/token of each run" not in rest


def test_missing_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the phase recall first"):
        write_report(tmp_path / "none.json", tmp_path / "r.md")


def test_mean_leaves_the_first_layer_out() -> None:
    assert mean([0.9, None, 0.5, 0.7]) == pytest.approx(0.6)
