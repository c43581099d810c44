"""Keep OpenMP's threads asleep in steps where the CPU engine's own threads do the work.

What PyTorch computes in a decode step is small, since the engine multiplies. Shared by OpenMP it
wakes a thread that then spins for milliseconds, on a core that a thread of the engine computes
experts on. Only attention over a long context is worth it, where PyTorch computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 4 << 20
"""Keys of one layer and step that one thread reads: 0.2 ms at 20 GB/s."""


def on_one_thread(
    compiled: Callable[..., Any], inputs: Sequence[Any], *, attends: bool = False
) -> Callable[..., Any]:
    """Run a compiled step with one OpenMP thread, as long as its keys are few.

    Args:
        compiled: the step.
        inputs: what it was traced with.
        attends: whether the engine computes attention as well, so that keys do not count.

    Returns:
        The same; or the step itself where no input looks like keys, [B, heads, length, head size].
    """
    at = next((i for i, value in enumerate(inputs) if _may_be_keys(value)), None)
    if at is None:
        return compiled

    def call(*given: Any) -> Any:
        threads = torch.get_num_threads()
        if threads == 1 or (not attends and given[at].nbytes > MAX_BYTES):
            return compiled(*given)
        torch.set_num_threads(1)
        try:
            return compiled(*given)
        finally:
            torch.set_num_threads(threads)

    return call


def _may_be_keys(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
