"""Two commits in turns: the order of turns, and what is added up; no commit is really run."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.end_to_end import commits
from benchmarks.kit.schema import problems


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Which side each turn was of; `resident` takes twice as long in this tree."""
    seen: list[str] = []

    @contextmanager
    def tree(commit: str) -> Any:
        yield tmp_path

    def turn(place: Path, model: Path, store: Path, given: Any) -> dict[str, float]:
        seen.append(store.name)
        assert (place == tmp_path) == (store.name == "base")
        slow = store.name == "ours"
        return {"cache": 10.0 + len(seen) % 3 + 0.1 * slow, "resident": 20.0 if slow else 10.0}

    monkeypatch.setattr(commits, "checkout", tree)
    monkeypatch.setattr(commits, "turn", turn)
    return seen


def run(tmp_path: Path, *more: str) -> int:
    places = ["--stores", str(tmp_path / "stores"), "--out", str(tmp_path / "out.json")]
    return commits.main(["--base", "1234567", "--model", str(tmp_path), *places, *more])


def test_rounds_go_back_and_forth_and_are_added(tmp_path: Path, turns: list[str]) -> None:
    assert run(tmp_path, "--rounds", "2") == 1, "resident takes twice as long"
    assert turns == ["base", "ours", "ours", "base"]
    assert run(tmp_path, "--rounds", "1") == 1
    assert turns[4:] == ["base", "ours"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["rounds"]) == 3 and problems(found) == []
    assert found["ratios"]["resident"] == {"ratio": 2.0, "error": 0.0}
    assert 0.8 < found["ratios"]["cache"]["ratio"] < 1.2


def test_another_commit_needs_another_file(tmp_path: Path, turns: list[str]) -> None:
    run(tmp_path, "--rounds", "2")
    with pytest.raises(ValueError, match="give another --out"):
        run(tmp_path, "--base", "7654321")
    assert len(turns) == 4


def test_an_unknown_commit_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="--base nothing"), commits.checkout("nothing"):
        pass
