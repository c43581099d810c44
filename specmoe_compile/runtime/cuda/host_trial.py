"""Whether prefetching pays where the host paces the steps, as with transfer `copy`."""

from __future__ import annotations

import time
from collections.abc import Callable

from specmoe_compile.runtime.cuda.step_trial import StepTrial


class HostTrial:
    """A `StepTrial` of steps that each end where the next begins: the host waits in every layer.

    Attributes:
        predicts: whether the step that began last may fetch ahead.
    """

    def __init__(
        self, lacked_bytes: Callable[[], int], now_s: Callable[[], float] = time.perf_counter
    ) -> None:
        """Begin with a trial.

        Args:
            lacked_bytes: what was needed so far and had to be copied, on demand or ahead.
            now_s: seconds.
        """
        self.predicts = True
        self._trial = StepTrial()
        self._lacked_bytes = lacked_bytes
        self._now_s = now_s
        self._last: tuple[float, int] | None = None

    @property
    def is_trying(self) -> bool:
        """Whether steps with and without predictions are being compared."""
        return self._trial.is_trying

    def begin_step(self) -> None:
        """End the step before, if it is known when it began, and begin one."""
        began = (self._now_s(), self._lacked_bytes())
        if self._last is not None:
            step_ms, lacked_bytes = (began[0] - self._last[0]) * 1e3, began[1] - self._last[1]
            if lacked_bytes >= 0:  # the counters were not reset
                self._trial.end(step_ms, lacked_bytes)
        self._last = began
        self.predicts = self._trial.begin()

    def pause(self) -> None:
        """Take note that the time until the next step is no step's."""
        self._last = None
