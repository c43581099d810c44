"""Which graphs that the backend compiled ran in this thread: one, or a step in pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class GraphRun(NamedTuple):
    """One call of a compiled graph.

    Attributes:
        graph: what was called, counted.
        inputs, results: as Dynamo's code gave and got them.
        is_all: whether Python does nothing around it but find inputs and wrap results.
    """

    graph: Callable[..., Any]
    inputs: tuple[Any, ...]
    results: Sequence[Any]
    is_all: bool


class _Here(threading.local):
    count: int = 0
    keeps: bool = False
    last: GraphRun | None = None


_here = _Here()


def counted(compiled: Callable[..., Any], *, is_all: bool = False) -> Callable[..., Any]:
    """A compiled graph whose calls are counted; `is_all` as in `GraphRun`."""

    def call(*args: Any) -> Any:
        _here.count += 1
        results = compiled(*args)
        if _here.keeps:
            _here.last = GraphRun(call, args, results, is_all)
        return results

    return call


def run_noting_graph(call: Callable[[], Any]) -> tuple[Any, GraphRun | None]:
    """Make a call; returns its result, and the graph that it ran if that was one alone."""
    before, _here.keeps, _here.last = _here.count, True, None
    try:
        result = call()
        return result, _here.last if _here.count == before + 1 else None
    finally:
        _here.keeps, _here.last = False, None
