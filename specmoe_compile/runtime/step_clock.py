"""What a prediction costs the host, measured: steps with predictions against steps without.

The time of a decode step that was not spent waiting for reads holds everything that predicting
adds: the lookahead, the split, the bookkeeping, and products slowed down by reads beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

BASELINE_STEPS = 8
"""Steps of both kinds that have to be measured before they are compared."""
_DECAY = 1.0 / 16
_OUTLIER = 2.0  # times the mean; such a step was disturbed by something else


class _Mean:
    """A running mean that outliers do not move far."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        if self.count > 2:
            value = min(value, _OUTLIER * self.value)
        self.value += max(_DECAY, 1.0 / self.count) * (value - self.value)


class StepClock:
    """Times decode steps from their plan to their last layer."""

    def __init__(self, now_s: Callable[[], float] | None = None) -> None:
        """Nothing measured yet; `now_s` is the clock, by default `time.perf_counter`."""
        self._now_s = now_s or (lambda: time.perf_counter())
        self._without = _Mean()
        self._with = _Mean()
        self._predicted = _Mean()
        self._started_s = 0.0
        self._stalled_ms = 0.0
        self._in_step = 0

    @property
    def cost_ms(self) -> float:
        """Milliseconds that one predicted layer adds to a step; 0 while that is not known."""
        if min(self._without.count, self._with.count) < BASELINE_STEPS or not self._predicted.value:
            return 0.0
        return max(0.0, (self._with.value - self._without.value) / self._predicted.value)

    def begin(self, predicted: int, stalled_ms: float) -> None:
        """Start a step with that many predicted layers; `stalled_ms` is the time waited so far."""
        self._in_step = predicted
        self._stalled_ms = stalled_ms
        self._started_s = self._now_s()

    def end(self, stalled_ms: float) -> float | None:
        """End the step that began; its milliseconds, None if none did or the counters went back."""
        started_s, self._started_s = self._started_s, 0.0
        waited_ms = stalled_ms - self._stalled_ms
        if not started_s or waited_ms < 0:
            return None
        step_ms = (self._now_s() - started_s) * 1e3
        worked_ms = step_ms - waited_ms
        if self._in_step:
            self._with.add(worked_ms)
            self._predicted.add(self._in_step)
        else:
            self._without.add(worked_ms)
        return step_ms
