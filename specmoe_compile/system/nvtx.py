"""Ranges such as `specmoe/L12/prefetch` on the host's time line of a profiler.

NVTX ranges, for Nsight Systems, are off until `enable` is called, or on from the start in a process
that Nsight profiles. While `torch.profiler` records, the same ranges appear in its trace. Otherwise
a range is two comparisons and a shared empty context.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.autograd import profiler

_NOTHING: AbstractContextManager[None] = nullcontext()
_nvtx: Any = None


def nsight_attached() -> bool:
    """Whether this process was started under a profiler that reads NVTX ranges."""
    names = ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH")
    return any(os.environ.get(name) for name in names)


def enable(on: bool = True) -> None:
    """Turn NVTX ranges on or off for the process.

    Raises:
        ImportError: ranges are asked for and the package `nvtx` is not installed.
    """
    global _nvtx
    if not on:
        _nvtx = None
        return
    import nvtx

    _nvtx = nvtx


def enabled() -> bool:
    """Return whether NVTX ranges are on."""
    return _nvtx is not None


def layer_range(layer: int, phase: str) -> AbstractContextManager[Any]:
    """Return a context that marks `specmoe/L<layer>/<phase>`, or one that does nothing."""
    profiled = profiler._is_profiler_enabled
    if _nvtx is None and not profiled:
        return _NOTHING
    name = f"specmoe/L{layer}/{phase}"
    if _nvtx is None:
        return profiler.record_function(name)
    if not profiled:
        return _nvtx.annotate(name)  # type: ignore[no-any-return]
    return _both(name)


@contextmanager
def _both(name: str) -> Iterator[None]:
    with profiler.record_function(name), _nvtx.annotate(name):
        yield


class OpenRange:
    """An NVTX range that one op opens and another one closes; `torch.profiler` cannot show it."""

    def __init__(self) -> None:
        self._is_open = False
        self._number: Any = None  # also where the range is open: None while no tool listens

    def open(self, layer: int, phase: str) -> None:
        """Begin `specmoe/L<layer>/<phase>`, unless a range is open."""
        if _nvtx is not None and not self._is_open:
            self._is_open = True
            self._number = _nvtx.start_range(f"specmoe/L{layer}/{phase}")

    def close(self) -> None:
        """End it, if there is one."""
        if self._is_open:
            self._is_open = False
            if _nvtx is not None:
                _nvtx.end_range(self._number)


if nsight_attached():
    enable()
