"""How many graphs that the backend compiled ran in this thread: one, or a step in pieces."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


class _Here(threading.local):
    count: int = 0


_here = _Here()


def counted(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph whose calls are counted."""

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        _here.count += 1
        return compiled(*args)

    return call


def graphs_run() -> int:
    """How many calls of such graphs this thread has begun."""
    return _here.count
