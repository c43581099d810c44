"""Whether workers that wait for their turn are idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

_LOOK_S = 0.2
_IDLE_SHARE = 0.05


def cpu_s(pid: int) -> float:
    """Processor time of a process and its children so far; 0 if it is gone."""
    try:
        process = psutil.Process(pid)
        times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    except psutil.Error:
        return 0.0
    return float(sum(t.user + t.system for t in times))


class IdleWatch:
    """How much processes compute that should be idle, while another one is measured."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = tuple(pids)
        self._start()

    def _start(self) -> None:
        self._cpu_s = self._total_s()
        self._started_s = time.monotonic()

    def _total_s(self) -> float:
        return sum(map(cpu_s, self._pids))

    def share(self) -> float:
        """Cores that all of them together used, on average since the watch began."""
        elapsed_s = time.monotonic() - self._started_s
        return max(self._total_s() - self._cpu_s, 0.0) / elapsed_s if elapsed_s > 0 else 0.0

    def wait_idle(self, *, limit_s: float, sleep: Callable[[float], Any] = time.sleep) -> bool:
        """Wait until they use next to nothing, then begin anew; False if they never do."""
        if not self._pids:
            return True
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            self._start()
            sleep(_LOOK_S)
            if self.share() < _IDLE_SHARE:
                self._start()
                return True
        self._start()
        return False
