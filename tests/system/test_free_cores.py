"""How many threads PyTorch gets beside other processes: made-up clocks, real threads of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from specmoe_compile.system import free_cores as module
from specmoe_compile.system.free_cores import FreeCores


class Clocks:
    """A machine of four cores: what passes, and what is done in it."""

    def __init__(self) -> None:
        self.now = self.own = 0.0
        self.idle: float | None = 0.0

    def passes(self, seconds: float, *, idle: float, own: float) -> None:
        """Let so many seconds pass, in which cores do nothing and this process computes."""
        self.now += seconds
        self.own += own * seconds
        if self.idle is not None:
            self.idle += idle * seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    made = Clocks()
    monkeypatch.setattr(module, "idle_s", lambda: made.idle)
    monkeypatch.setattr(module, "cpu_count", lambda: 4)
    monkeypatch.setattr(module.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(module.time, "process_time", lambda: made.own)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield made
    torch.set_num_threads(before)


def threads(cores: FreeCores) -> int:
    with cores.used():
        return torch.get_num_threads()


@pytest.mark.parametrize(
    ("idle", "own", "want"),
    [(4.0, 0.0, 4), (0.0, 4.0, 4), (2.8, 1.0, 4), (1.0, 2.0, 3), (0.0, 2.0, 2), (0.0, 0.4, 1)],
)
def test_each_core_that_others_use_is_a_thread_less(
    idle: float, own: float, want: int, clocks: Clocks
) -> None:
    cores = FreeCores()
    assert threads(cores) == 4  # nothing is known yet
    clocks.passes(0.06, idle=idle, own=own)
    assert threads(cores) == want
    assert torch.get_num_threads() == 4


def test_it_looks_again_while_it_computes(clocks: Clocks) -> None:
    cores = FreeCores()
    with cores.used():
        assert threads(cores) == 4
        clocks.passes(0.06, idle=0.0, own=1.0)
        assert threads(cores) == 1
        clocks.passes(0.06, idle=3.0, own=1.0)
        assert threads(cores) == 4
    assert torch.get_num_threads() == 4


def test_what_was_long_ago_does_not_count_nor_what_was_just_now(clocks: Clocks) -> None:
    cores = FreeCores()
    threads(cores)
    clocks.passes(5.0, idle=0.0, own=0.0)
    assert threads(cores) == 4
    clocks.passes(0.01, idle=0.0, own=0.0)
    assert threads(cores) == 4


def test_a_system_that_does_not_say_changes_nothing(clocks: Clocks) -> None:
    clocks.idle = None
    cores = FreeCores()
    for _ in range(3):
        assert threads(cores) == 4
        clocks.passes(0.06, idle=0.0, own=0.0)


def test_never_more_threads_than_there_were_and_they_come_back(clocks: Clocks) -> None:
    cores = FreeCores()
    threads(cores)
    clocks.passes(0.06, idle=0.0, own=2.0)
    torch.set_num_threads(3)
    with pytest.raises(ZeroDivisionError), cores.used():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3
