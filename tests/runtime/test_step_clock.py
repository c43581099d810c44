"""The clock knows what predictions cost the host, and nothing before it has compared."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from specmoe_compile.runtime.step_clock import BASELINE_STEPS, StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock in seconds that the test moves."""
    moved = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: moved[0])
    yield moved


def _step(
    clock: StepClock, now: list[float], predicted: int, took_ms: float, waited: float
) -> None:
    clock.begin(predicted, 5.0)
    now[0] += took_ms / 1e3
    clock.end(5.0 + waited)


def test_cost_is_the_difference_without_waits_per_layer(now: list[float]) -> None:
    clock = StepClock()
    for step in range(2 * BASELINE_STEPS):
        assert clock.cost_ms == 0.0
        if step % 2:
            _step(clock, now, predicted=4, took_ms=30.0 + step, waited=20.0 + step)
        else:
            _step(clock, now, predicted=0, took_ms=18.0, waited=10.0)
    assert clock.cost_ms == pytest.approx((10.0 - 8.0) / 4)


def test_disturbed_steps_and_reset_counters_do_not_count(now: list[float]) -> None:
    clock = StepClock()
    for _ in range(BASELINE_STEPS):
        _step(clock, now, predicted=0, took_ms=8.0, waited=0.0)
        _step(clock, now, predicted=2, took_ms=8.0, waited=0.0)
    _step(clock, now, predicted=2, took_ms=1000.0, waited=0.0)
    assert clock.cost_ms < 0.5
    before = clock.cost_ms
    _step(clock, now, predicted=2, took_ms=1000.0, waited=-1.0)
    clock.end(0.0)
    assert clock.cost_ms == before
