"""The token clock leaves out what happens inside it."""

from __future__ import annotations

from typing import Any

import pytest

from specmoe_compile.bench import timing
from specmoe_compile.bench.timing import TokenClock


class FakeTime:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing.time, "perf_counter", fake.perf_counter)
    return fake


class SlowPrinter:
    """A streamer that takes a second for everything."""

    def __init__(self, fake: FakeTime) -> None:
        self._fake = fake
        self.got: list[Any] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self._fake.now_s += 1.0
        self.got.append(value)

    def end(self) -> None:
        self.ended = True


def test_times_between_tokens_leave_out_printing(clock_time: FakeTime) -> None:
    printer = SlowPrinter(clock_time)
    counts: list[int] = []
    clock = TokenClock(inner=printer, on_token=counts.append)
    clock.start()
    clock.put("prompt")
    clock_time.now_s += 0.5
    clock.put("a")
    clock_time.now_s += 0.25
    clock.put("b")
    clock_time.now_s += 0.125
    clock.put("c")
    clock.end()
    # The prompt arrives before the model runs, so handing it on is part of the first token.
    assert clock.ttft_ms == pytest.approx(1500.0)
    assert clock.intervals_ms == pytest.approx([250.0, 125.0])
    assert counts == [1, 2, 3]
    assert printer.got == ["prompt", "a", "b", "c"]
    assert printer.ended


def test_a_clock_can_be_started_again(clock_time: FakeTime) -> None:
    clock = TokenClock()
    for _ in range(2):
        clock.start()
        clock.put("prompt")
        clock_time.now_s += 0.1
        clock.put("a")
    assert clock.ttft_ms == pytest.approx(100.0)
    assert clock.intervals_ms == []
