"""Every published result says where it comes from, in one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kit.places import RESULTS
from benchmarks.kit.schema import problems

HEAD = {"schema": 1, "commit": "abc", "machine": {"cores": 2}, "versions": {"torch": "2.13"}}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_published_result_fits_the_schema(path: Path) -> None:
    assert problems(json.loads(path.read_text(encoding="utf-8"))) == []


def test_results_are_looked_at() -> None:
    assert len(list(RESULTS.glob("*.json"))) > 10


@pytest.mark.parametrize(
    "head",
    [
        HEAD,
        {**HEAD, "commit": None, "note": "not recorded"},
        {"schema": 1, "timing": HEAD},
        {key: value for key, value in HEAD.items() if key != "commit"} | {"commits": ["abc"]},
    ],
)
def test_these_heads_fit(head: dict[str, Any]) -> None:
    assert problems(head) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": None}, "schema"),
        ({"schema": True}, "schema"),
        ({"commit": None}, "commit"),
        ({"commit": ""}, "commit"),
        ({"machine": "a GPU"}, "machine"),
        ({"versions": {}}, "versions"),
    ],
)
def test_a_head_that_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    found = problems({**HEAD, **change})
    assert len(found) == 1 and found[0].startswith(named)


def test_a_phase_that_does_not_fit_is_named() -> None:
    found = problems({"schema": 1, "timing": {**HEAD, "commit": None}, "cost": HEAD})
    assert len(found) == 1 and found[0].startswith("timing: commit")


def test_what_is_no_object_does_not_fit() -> None:
    assert problems([1]) == ["the file holds a list, expected an object"]
