"""What is put around a compiled graph that becomes a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specmoe_compile.system.progress import phase

Compiled = Callable[..., Any]


def telling_of_capture(compiled: Compiled, step_name: str) -> Compiled:
    """Tell of the calls that warm a CUDA graph up and record it, the first two."""
    what = f"capturing {step_name} in a CUDA graph"
    calls_left = 2

    def call(*inputs: Any) -> Any:
        nonlocal calls_left
        if calls_left == 0:
            return compiled(*inputs)
        calls_left -= 1
        with phase(what):
            return compiled(*inputs)

    return call


def keeping_results(captured: Compiled, made: frozenset[int]) -> Compiled:
    """Copy what a CUDA graph makes out of the graph's memory, as the last work of the call.

    The next run writes over that memory, or PyTorch takes it away while it records. The caller may
    read the result after another thread, or a step that was launched early, has run the graph.

    Args:
        captured: the compiled graph.
        made: which of its results it makes; the others were there before (a cache).
    """

    def call(*inputs: Any) -> Any:
        results = captured(*inputs)
        return type(results)(
            result.clone() if index in made and isinstance(result, torch.Tensor) else result
            for index, result in enumerate(results)
        )

    return call
