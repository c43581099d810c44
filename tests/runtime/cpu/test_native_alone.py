"""When the C++ engine computes on its caller's thread alone: made-up times, and the same bits."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from ctypes import c_double
from typing import NamedTuple

import pytest
import torch

from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT
from specmoe_compile.system.free_cores import idle_s
from tests.runtime.cpu.test_native_kernels import Experts, engine, run

MIB = 1 << 20


class Times(ctypes.Structure):
    """`RunTimes` of alone.h."""

    _fields_ = tuple((name, c_double) for name in ("wall_ns", "core_ns", "bytes", "chunks", "own"))


class Way(NamedTuple):
    """How runs of 12 MiB in 48 chunks go: time, the caller's share of a core and of the chunks."""

    wall_ms: float
    core: float
    own: float

    def times(self) -> Times:
        return Times(
            self.wall_ms * 1e6, self.wall_ms * self.core * 1e6, 12 * MIB, 48, self.own * 48
        )


class Machine(NamedTuple):
    """How runs go with all threads, and on one."""

    shared: Way
    alone: Way


FREE = Machine(Way(0.45, 1.0, 0.5), Way(0.62, 1.0, 1.0))
CROWDED = Machine(Way(1.3, 0.5, 0.8), Way(0.8, 0.7, 1.0))
CROWDED_BUT_WORTH_IT = Machine(Way(0.7, 0.6, 0.7), Way(0.9, 0.7, 1.0))
MANY_CORES = Machine(Way(0.05, 0.3, 0.02), Way(0.9, 0.7, 1.0))


_IdleClock = ctypes.CFUNCTYPE(c_double)


class Trial:
    """`AloneTrial`, on machines that are made up."""

    def __init__(self, pointer: int | None = None, *, free_cores: float | None = None) -> None:
        library = library_or_none()
        if library is None:
            pytest.skip("no C++ compiler")
        self.library = library
        self.wall_ns = 0.0
        self.free_cores = free_cores
        self.clock = _IdleClock(lambda: self.wall_ns * (self.free_cores or 0.0))
        self.pointer = pointer or library.specmoe_alone_new()
        library.specmoe_alone_ask(self.pointer, None if free_cores is None else self.clock)

    @property
    def is_alone(self) -> bool:
        return bool(self.library.specmoe_alone_is(self.pointer))

    def run(self, machine: Machine, runs: int, tokens: int = 1) -> list[bool]:
        """Which of so many runs were alone."""
        ways = []
        for _ in range(runs):
            ways.append(self.is_alone)
            times = machine[self.is_alone].times()
            self.wall_ns += times.wall_ns
            self.library.specmoe_alone_end(self.pointer, ctypes.byref(times), tokens)
        return ways


@pytest.fixture
def trial() -> Iterator[Trial]:
    made = Trial()
    yield made
    made.library.specmoe_alone_delete(made.pointer)


def mean_ms(machine: Machine, ways: list[bool]) -> float:
    return sum(machine[way].wall_ms for way in ways) / len(ways)


@pytest.mark.parametrize("machine", [FREE, MANY_CORES])
def test_nothing_is_tried_where_one_thread_cannot_win(machine: Machine, trial: Trial) -> None:
    assert not any(trial.run(machine, 20_000))


def test_one_crowded_moment_is_no_reason(trial: Trial) -> None:
    for _ in range(100):
        assert not any(trial.run(CROWDED, 13))  # one window
        assert not any(trial.run(FREE, 100))


def test_beside_busy_processes_nearly_all_runs_are_alone(trial: Trial) -> None:
    assert trial.run(CROWDED, 30)[-1]  # within 40 ms
    ways = trial.run(CROWDED, 20_000)
    assert not all(ways)
    assert mean_ms(CROWDED, ways) < 1.02 * CROWDED.alone.wall_ms


def test_all_threads_come_back_when_cores_are_free(trial: Trial) -> None:
    trial.run(CROWDED, 20_000)
    ways = trial.run(FREE, 4000)  # 2.5 s
    assert any(ways)
    assert not any(trial.run(FREE, 20_000))


def test_nobody_looks_while_all_cores_are_in_use(trial: Trial) -> None:
    busy = Trial(free_cores=0.05)
    assert busy.run(CROWDED, 30)[-1]
    assert all(busy.run(CROWDED, 20_000))
    busy.free_cores = 1.0
    ways = busy.run(FREE, 1000)  # 0.6 s: the next time that it asks
    assert any(ways)
    assert not any(busy.run(FREE, 20_000))
    busy.library.specmoe_alone_delete(busy.pointer)
    trial.run(CROWDED, 30)
    assert not all(trial.run(CROWDED, 20_000))  # where nobody says what is in use


def test_a_machine_without_an_answer_is_looked_at() -> None:
    silent = Trial(free_cores=-1.0)
    assert silent.run(CROWDED, 30)[-1]
    assert not all(silent.run(CROWDED, 20_000))
    silent.library.specmoe_alone_delete(silent.pointer)


@pytest.mark.skipif(idle_s() is None, reason="the system does not say")
def test_idle_time_is_that_of_the_cores_it_may_use(trial: Trial) -> None:
    idle_ns = trial.library.specmoe_idle_ns
    cores = os.sched_getaffinity(0)
    try:
        for chosen in ({min(cores)}, cores):
            os.sched_setaffinity(0, chosen)
            before, told, after = idle_s(), idle_ns() / 1e9, idle_s()
            assert before is not None and after is not None
            assert before - 1e-3 <= told <= after + 1e-3
        os.sched_setaffinity(0, {min(cores)})
        began, before = time.perf_counter(), idle_ns()
        while time.perf_counter() < began + 0.3:
            pass
        assert idle_ns() - before <= 0.1e9  # this very thread keeps it busy
    finally:
        os.sched_setaffinity(0, cores)


def test_all_threads_stay_where_they_are_faster_in_a_crowd(trial: Trial) -> None:
    machine = CROWDED_BUT_WORTH_IT
    ways = trial.run(machine, 20_000)
    assert any(ways)
    assert mean_ms(machine, ways) < 1.02 * machine.shared.wall_ms


def test_another_number_of_tokens_is_another_matter(trial: Trial) -> None:
    assert trial.run(CROWDED, 30)[-1]
    trial.run(CROWDED, 1, tokens=2)
    assert not trial.is_alone


def test_a_change_between_steps_changes_no_bit() -> None:
    experts = Experts(256, 1024, PLAIN_FORMAT, torch.float32, count=4)
    want, _ = run(engine("portable", 1), experts, 3)
    tool = engine("portable", 3)
    trial = Trial(tool.library.specmoe_alone_of(tool.pointer))
    for threads in (3, 2, 4):
        tool.set_threads(threads)
        for machine, runs in ((CROWDED, 100), (FREE, 4000)):
            trial.run(machine, runs, tokens=3)
            assert trial.is_alone == (machine is CROWDED)
            assert torch.equal(run(tool, experts, 3)[0], want)
