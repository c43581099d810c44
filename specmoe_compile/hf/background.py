"""Decode steps run as the model is while another thread compiles them: tokens from the start.

A step of a kind that was not compiled yet (`compile_in_background=True`) goes to the plain model,
and a thread calls the compiled one with the same arguments. All that this does is trace and
compile: where the graph would run, it ends (`graph_runs.only_compiling`). Once it has ended, steps
of the kind go to the compiled model, which finds its graph.

Only steps of a `generate` that repeat each other are sent to the plain model, whose caches count
nothing on the host: what Dynamo reads while the generation goes on must not change. And only where
no random number is drawn, since Dynamo puts the generators back to where a trace began.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from specmoe_compile.hf.guard_checks import running_loop
from specmoe_compile.hf.recompile_limit import raised_recompile_limit
from specmoe_compile.hf.step_inputs import cache_of
from specmoe_compile.system.graph_runs import only_compiling

log = logging.getLogger(__name__)

THREAD_NAME = "specmoe-compile"


class BackgroundCompiling:
    """What was compiled of one forward call, or is; to be used by one call at a time."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        """Of a call through `torch.compile`; nothing is compiled yet."""
        self._compiled = compiled
        self._threads: dict[Any, threading.Thread] = {}

    def goes_on(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a decode step has to run as the model is; the first of its kind begins it."""
        loop = running_loop()
        if loop is None or loop.draws or not _counts_on_device(arguments):
            return False
        kind = _kind(arguments)
        thread = self._threads.get(kind)
        if thread is None:
            thread = self._begin(dict(arguments))
            self._threads[kind] = thread
        if not thread.is_alive():
            return False
        loop.plain += 1
        return True

    def _begin(self, arguments: dict[str, Any]) -> threading.Thread:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        infers, compiled = torch.is_inference_mode_enabled(), self._compiled

        def work() -> None:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.inference_mode(infers), torch.no_grad(), raised_recompile_limit():
                try:
                    with only_compiling():
                        compiled(**arguments)
                except Exception:
                    # The next step compiles again, and its caller hears of it.
                    log.info("compiling in the background failed", exc_info=True)

        # Not a daemon: a process that ends in the middle of a compilation may crash.
        thread = threading.Thread(target=work, name=THREAD_NAME)
        thread.start()
        return thread


def _counts_on_device(arguments: Mapping[str, Any]) -> bool:
    """Whether no layer of the cache counts tokens on the host."""
    layers: Any = getattr(cache_of(dict(arguments)), "layers", None)
    return bool(layers) and all(type(layer) is StaticLayer for layer in layers)


def _kind(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells two compiled graphs apart, of arguments and cache; equal kinds share a graph."""
    tensors = [layer.keys for layer in cache_of(dict(arguments)).layers]
    given = []
    for name, value in sorted(arguments.items()):
        if isinstance(value, Tensor):
            tensors.append(value)
        else:
            plain = isinstance(value, bool | int | str | None)
            given.append((name, value if plain else type(value).__name__))
    return (*given, *((tuple(t.shape), t.dtype) for t in tensors))
