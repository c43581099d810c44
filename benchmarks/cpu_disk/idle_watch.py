"""Whether workers that wait for their turn are idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from specmoe_compile.bench.live_worker import LiveWorker

_LOOK_S = 0.2
_IDLE_SHARE = 0.05


class IdleWatch:
    """How much workers compute that should be idle, while another one is measured."""

    def __init__(self, workers: Sequence[LiveWorker]) -> None:
        self._workers = list(workers)
        self._start()

    def _start(self) -> None:
        self._cpu_s = self._total_s()
        self._started_s = time.monotonic()

    def _total_s(self) -> float:
        return sum(worker.cpu_s() for worker in self._workers)

    def share(self) -> float:
        """Cores that all of them together used, on average since the watch began."""
        elapsed_s = time.monotonic() - self._started_s
        return max(self._total_s() - self._cpu_s, 0.0) / elapsed_s if elapsed_s > 0 else 0.0

    def wait_idle(self, *, limit_s: float, sleep: Callable[[float], Any] = time.sleep) -> bool:
        """Wait until they use next to nothing, then begin anew; False if they never do."""
        if not self._workers:
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
