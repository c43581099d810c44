"""Which graphs that the backend compiled ran in this thread: one, or a step in pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    only_compiles: bool = False
    last: GraphRun | None = None


_here = _Here()


def counted(compiled: Callable[..., Any], *, is_all: bool = False) -> Callable[..., Any]:
    """A compiled graph whose calls are counted; `is_all` as in `GraphRun`."""

    def call(*args: Any) -> Any:
        if _here.only_compiles:
            raise _Compiled
        _here.count += 1
        results = compiled(*args)
        if _here.keeps:
            _here.last = GraphRun(call, args, results, is_all)
        return results

    return call


class _Compiled(BaseException):
    """A graph is compiled, and was not to run."""


@contextmanager
def only_compiling() -> Iterator[None]:
    """In this thread, end the block where the first graph would run."""
    _here.only_compiles = True
    try:
        yield
    except _Compiled:
        pass
    finally:
        _here.only_compiles = False


def only_compiles() -> bool:
    """Whether this thread is in such a block."""
    return _here.only_compiles


def graphs_run() -> int:
    """How many calls of such graphs this thread has begun."""
    return _here.count


def run_noting_graph(call: Callable[[], Any]) -> tuple[Any, GraphRun | None]:
    """Make a call; returns its result, and the graph that it ran if that was one alone."""
    before, _here.keeps, _here.last = _here.count, True, None
    try:
        result = call()
        return result, _here.last if _here.count == before + 1 else None
    finally:
        _here.keeps, _here.last = False, None
