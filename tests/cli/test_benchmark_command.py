"""A benchmark's command explains what a caller can correct, and hides nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.command import explains_errors


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
