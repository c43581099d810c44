"""Processes that share a machine: many prepare, and one measures, alone."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.kit.turns import preparing, turn
from tests.helpers import PATIENCE_S


def _starts_within(entered: AbstractContextManager[None], seconds: float) -> threading.Thread:
    """A thread that enters and leaves; waits so long for it."""

    def work() -> None:
        with entered:
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread


def test_many_prepare_at_once_and_one_measures_alone(tmp_path: Path) -> None:
    file = tmp_path / "turns"
    with preparing(file):
        assert not _starts_within(preparing(file), PATIENCE_S).is_alive(), (
            "who prepares waits for none"
        )
        waiting = _starts_within(turn(file), 0.2)
        assert waiting.is_alive(), "measured beside one who prepares"
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    with turn(file):
        threads = [_starts_within(entered(file), 0.2) for entered in (turn, preparing)]
        assert all(thread.is_alive() for thread in threads), "the machine is not idle"
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_without_a_file_nobody_waits() -> None:
    with turn(None), turn(None), preparing(None):
        pass
