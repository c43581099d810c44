"""A session's counters over a part of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

Counters = dict[str, Any]
"""`{"total": {...}, "layers": [{...}, ...], "read_busy_ms": ms}`, counters of `LayerStats` only."""


class CounterLaps:
    """Splits a session's counters into laps, without resetting them."""

    def __init__(self, read_stats: Callable[[], Any]) -> None:
        """Start the first lap.

        Args:
            read_stats: returns `runtime.stats.Stats` of the session so far.
        """
        self._read = read_stats
        self._before = _counters(read_stats())

    def lap(self) -> Counters:
        """Return what was counted since the last lap, and start the next one."""
        now = _counters(self._read())
        before, self._before = self._before, now
        return _combine(now, before, sign=-1)


def add_counters(left: Counters | None, right: Counters) -> Counters:
    """Sum of two laps; None is an empty one."""
    return right if left is None else _combine(left, right, sign=1)


def _counters(stats: Any) -> Counters:
    return {
        "total": asdict(stats.total),
        "layers": [asdict(layer) for layer in stats.layers],
        "read_busy_ms": stats.read_busy_ms,
    }


def _combine(left: Counters, right: Counters, *, sign: int) -> Counters:
    def add(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
        return {name: a[name] + sign * b[name] for name in a}

    return {
        "total": add(left["total"], right["total"]),
        "layers": [add(a, b) for a, b in zip(left["layers"], right["layers"], strict=True)],
        "read_busy_ms": left["read_busy_ms"] + sign * right["read_busy_ms"],
    }
