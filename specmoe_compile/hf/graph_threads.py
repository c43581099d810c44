"""CUDA graphs of one model, recorded and run by any of the process's threads.

PyTorch keeps the memory of CUDA graphs, and what it knows of their results, in "trees" that belong
to the thread that recorded them; a thread that PyTorch did not start has none, and fails with a
bare AssertionError (torch 2.11). A compiled function stays with the tree it was recorded in,
whichever thread calls it, so that two models recorded by one thread and called by two would change
one tree at the same time.

Here the trees belong to a model: whoever runs it sees these and no others, and a model runs one
forward call at a time (`hf.compiled_calls`), so that they have one user at a time.

`torch._dynamo.reset()` clears the trees of the thread that calls it, not these, and turns off what
all trees need to give their results back.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

_NAMES = ("tree_manager_containers", "tree_manager_locks")
_MISSING = object()


class GraphState:
    """The trees of CUDA graphs of one model, and the stream that they last ran on."""

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        self._values: tuple[Any, Any] = ({}, defaultdict(threading.Lock))
        self._stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def in_use(self, device: torch.device) -> Iterator[None]:
        """Let this thread run and record the model's graphs; one thread at a time.

        Work of a call on another stream than the last call's begins when that call's has ended:
        both use the memory of the same graphs. A call that fails leaves trees that can go on.
        """
        from torch._inductor import cudagraph_trees

        local = cudagraph_trees.local
        before = [getattr(local, name, _MISSING) for name in _NAMES]
        self._follow(torch.cuda.current_stream(device))
        for name, value in zip(_NAMES, self._values, strict=True):
            setattr(local, name, value)
        cudagraph_trees._set_cached_tensors_enabled(True)  # type: ignore[attr-defined]
        try:
            yield
        except BaseException:
            self._forget_broken_warm_up()
            raise
        finally:
            for name, value in zip(_NAMES, before, strict=True):
                if value is _MISSING:
                    delattr(local, name)
                else:
                    setattr(local, name, value)

    def _forget_broken_warm_up(self) -> None:
        """Make a tree whose function failed as it first ran in the graphs' memory begin again.

        PyTorch takes such a function for warmed up and waits for its results. A broken recording
        needs nothing: it was no part of the tree yet.
        """
        from torch._inductor.cudagraph_trees import CUDAWarmupNode

        containers, _ = self._values
        for container in containers.values():
            manager = container.tree_manager
            node = None if manager is None else manager.current_node
            if isinstance(node, CUDAWarmupNode) and not node.tensor_weakrefs:
                manager.warmed_up_functions.discard(node.wrapped_function.id)
                manager.current_node = None

    def _follow(self, stream: torch.cuda.Stream) -> None:
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream
