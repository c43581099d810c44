"""NVTX ranges such as `specmoe/L12/prefetch`, which profilers show on the host's time line.

Off until `enable` is called; until then a range is one comparison and a shared empty context.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

_NOTHING: AbstractContextManager[None] = nullcontext()
_nvtx: Any = None


def enable(on: bool = True) -> None:
    """Turn ranges on or off for the process.

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
    """Return whether ranges are on."""
    return _nvtx is not None


def layer_range(layer: int, phase: str) -> AbstractContextManager[Any]:
    """Return a context that marks `specmoe/L<layer>/<phase>`, or one that does nothing."""
    if _nvtx is None:
        return _NOTHING
    return _nvtx.annotate(f"specmoe/L{layer}/{phase}")  # type: ignore[no-any-return]
