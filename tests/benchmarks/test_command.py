"""A benchmark's command explains what a caller can correct, and hides nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.kit.command import explains_errors
from specmoe_compile.bench.machine import commit_or_none


def test_a_mistake_is_one_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    @explains_errors
    def main(argv: Sequence[str] | None = None) -> int:
        raise ValueError(f"there is no\n{argv}")

    assert main(["x"]) == 2
    assert capsys.readouterr().err == "error: there is no ['x'].\n"


def test_other_errors_and_results_pass() -> None:
    @explains_errors
    def main(argv: Sequence[str] | None = None) -> int:
        return 1 if argv is None else len(argv[7])

    assert main() == 1
    with pytest.raises(IndexError):
        main([])


def test_a_result_names_the_commit_of_its_tree() -> None:
    """Outside a clone there is none; these tests run in one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a clone")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit_or_none() or "")
