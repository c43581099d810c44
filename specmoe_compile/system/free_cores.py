"""Fewer threads for PyTorch's products while other processes use the cores.

OpenMP shares a product among threads that all wait for the last one. Where another process has the
core of one of them, that is a time slice of the system, 40 times what an expert's product takes. So
PyTorch gets as many threads as there are cores that nobody else uses, as far as the system says it.
Sums keep their order: products are divided by rows and columns of what comes out.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import torch

from specmoe_compile.system.machine import cpu_count

WINDOW_S = 0.05
"""The system counts in hundredths of a second."""
_MAX_WINDOW_S = 1.0
_TICK_S = 1.0 / (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)


def idle_s() -> float | None:
    """Seconds in which cores that this process may use did nothing, added up; None: not known.

    Counts from the start of the system. Waiting for a disk is doing nothing.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    try:
        with open("/proc/stat", encoding="ascii") as file:
            cores = [line.split() for line in file if line.startswith("cpu") and line[3] != " "]
    except OSError:
        return None
    usable = os.sched_getaffinity(0)
    idle = [int(core[4]) + int(core[5]) for core in cores if int(core[0][3:]) in usable]
    return sum(idle) * _TICK_S if idle else None


class FreeCores:
    """How many threads of this process have a core to themselves."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._before: tuple[float, float, float] | None = None
        self._others = 0.0

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Give PyTorch so many threads until the block ends, and never more than it had before."""
        outer: int | None = getattr(self._local, "most", None)
        had = torch.get_num_threads()
        most = had if outer is None else outer
        if most < 2:
            yield
            return
        self._look()
        wanted = max(1, most - round(self._others))
        if wanted != had:
            torch.set_num_threads(wanted)
        self._local.most = most
        try:
            yield
        finally:
            self._local.most = outer
            if outer is None and torch.get_num_threads() != had:
                torch.set_num_threads(had)

    def _look(self) -> None:
        """Take in what went on since the last look, if that is long enough ago."""
        now = time.perf_counter()
        if self._before is not None and now - self._before[0] < WINDOW_S:
            return
        idle = idle_s()
        if idle is None:
            return
        before, self._before = self._before, (now, idle, time.process_time())
        if before is None:
            return
        wall, idle, own = (new - old for new, old in zip(self._before, before, strict=True))
        if wall > _MAX_WINDOW_S:  # says little of this moment
            return
        self._others = max(0.0, cpu_count() - (idle + own) / wall)


free_cores = FreeCores()
"""The process's."""
