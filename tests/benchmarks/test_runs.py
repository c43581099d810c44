"""`python -m benchmarks RUN`: every run has a line, a `main`, and is found by its name."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import RUNS, about, load, main


def test_list_says_what_each_run_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RUNS)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", RUNS)
def test_each_run_is_there(name: str) -> None:
    assert about(name).endswith((".", ")"))
    assert callable(load(name))


def test_an_unknown_run_is_one_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    assert "no benchmark 'nothing'" in capsys.readouterr().err
