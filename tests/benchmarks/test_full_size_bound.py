"""Simulated decoding at full size: what it takes a token, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.full_size.arms import ARMS
from benchmarks.full_size.bound import Decoding, Machine, fastest, step_times
from benchmarks.full_size.trials import row_of, trial

ARM_OF = {0: ARMS["prefetch_no_cache"], 50: ARMS["specmoe_50"]}
MACHINE = Machine(record_ms=2.0, layer_ms=3.0)
# Three layers, four experts, two of them per token; the second token needs the same again.
TRUE = [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[1, 2], [1, 2]]]
WRONG = [[[3, 2], [3, 2]], [[0, 1], [0, 1]], [[0, 3], [0, 3]]]


def times(predicted: list[list[list[int]]], share: int, amount: int) -> list[float]:
    return list(step_times(TRUE, predicted, MACHINE, experts=4, arm=ARM_OF[share], amount=amount))


def test_on_demand_reads_after_computing() -> None:
    assert times(TRUE, 0, 0) == [3 * (3 + 4)] * 2


def test_a_right_guess_hides_behind_the_computing_of_the_layer_before() -> None:
    # One record of 2 ms is hidden in 3 ms, two take 4: the first layer is never predicted.
    assert times(TRUE, 0, 1) == [(3 + 4) + 2 * (3 + 2)] * 2
    assert times(TRUE, 0, 2) == [(3 + 4) + 2 * 4] * 2


def test_a_wrong_guess_costs_what_computing_does_not_hide() -> None:
    assert times(WRONG, 0, 1) == [3 * (3 + 4)] * 2
    assert times(WRONG, 0, 2) == [(3 + 4) + 2 * (4 + 4)] * 2


def test_a_cache_keeps_what_the_next_token_needs() -> None:
    assert times(TRUE, 50, 0) == [3 * (3 + 4), 9]
    assert times(WRONG, 50, 1)[1] > 9  # what was guessed pushed out what was there


def test_the_best_amount_is_found() -> None:
    many = [layer * 60 for layer in TRUE]
    assert fastest(many, many, MACHINE, experts=4, arm=ARM_OF[0]) == (15.0, 2)


def test_a_trial_ends_with_the_best_amount_of_the_simulated_machine() -> None:
    def begin() -> Decoding:
        return Decoding(TRUE, TRUE, MACHINE, experts=4, arm=ARM_OF[0])

    # 15 ms a token with two ahead, 17 with one, 21 with none.
    found = trial(begin(), [1, 2, 0], seed=0)
    assert found.amount == 2 and found.steps < 300
    best, share, slower, loss, _ = row_of(begin, [1, 2, 0], trials=3, tokens=2)
    assert (best, share, loss) == ("2", "3 of 3", "0.0%, 0.0%")
    assert slower == "1: 13.3%, 2: 0.0%, 0: 40.0%"


def test_another_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.benchmarks.test_full_size import made_trace

    made_trace().save(tmp_path / "other.safetensors")
    result = Path(__file__).parents[2] / "benchmarks" / "results" / "full_size_h100_3.json"
    assert (
        main(["gpu_full_size_bound", str(result), "--trace", str(tmp_path / "other.safetensors")])
        == 2
    )
    error = capsys.readouterr().err
    assert "is not the trace of" in error and error.count("\n") == 1
