"""Dynamo's checks of a compiled call, left out where a decode step repeats the one before it.

At every call Dynamo asks whether what it traced still holds: some hundred conditions per layer, on
modules, weights and arguments. With 48 layers that is milliseconds, and where a weight is a
`DTensor` it is more than a GPU takes for the step. PyTorch can leave out all but the conditions
that tell two compiled graphs apart (`torch.compiler.set_stance(skip_guard_eval_unsafe=True)`), but
only for the whole process. Here that is said for one thread and one call, and only for a step

- of one `generate`, whose arguments differ from the last step's in values alone,
- that ran as one graph of specmoe's the last time, not in pieces that share their code,
- with no other forward call of the model in between, so that the graph of the last step is the
  first that Dynamo looks at,
- after `SURE` calls that were checked in full; and one of `EVERY` is checked in full again.

Such a step calls its graph without Dynamo, where that is the same (`replayed_steps`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._dynamo import eval_frame

from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS
from specmoe_compile.hf.replayed_steps import CheckedStep, Replay, can_replay
from specmoe_compile.system.graph_runs import run_noting_graph

SURE = 4
EVERY = 16
_STANCE = "_is_skip_guard_eval_unsafe_stance"
_RECOMPILED = "skip_guard_eval_unsafe"


class Here(threading.local):
    """What holds for the forward calls of this thread.

    Attributes:
        loop: the generation whose steps repeat each other, if one runs.
        skips: whether the call that begins leaves its checks out.
    """

    loop: Repeats | None = None
    skips: bool = False


class Repeats:
    """One generation, from the step on whose arguments are the last step's with other values.

    Attributes:
        calls: how many calls came one after the other.
        whole: whether the last one that was checked ran as one graph.
        checked: the last one that was checked, where later ones may repeat it without Dynamo.
        replay: how they do it, once two that were checked were the same.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.whole = False
        self.checked: CheckedStep | None = None
        self.replay: Replay | None = None

    @contextmanager
    def step(self, *, repeats: bool) -> Iterator[None]:
        """Around a forward call; `repeats` says whether its arguments are as said above."""
        _here.loop = self if repeats else None
        try:
            yield
        finally:
            _here.loop = None


class GuardChecks:
    """Which calls of one model are checked; to be used by one call at a time."""

    def __init__(self) -> None:
        """Check the first."""
        _install()
        self._last: Repeats | None = None

    def replay_or_none(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Replay | None:
        """How to make a call without Dynamo, if it repeats the last one; it counts as made then."""
        loop = _here.loop
        if loop is None or loop.replay is None or loop is not self._last or args:
            return None
        if (loop.calls + 1) % EVERY == 0 or not loop.replay.fits(call, kwargs):
            return None
        loop.calls += 1
        return loop.replay

    def run(
        self, call: Callable[..., Any], *args: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> Any:
        """Make a call, checked in full unless it repeats the last one.

        Args:
            call: of the model, through `torch.compile`.
            args, kwargs: its arguments.
            model: whose call it is, if repetitions may do without Dynamo.
        """
        loop = _here.loop
        if loop is not None:
            loop.calls = loop.calls + 1 if loop is self._last else 0
        self._last = loop
        if loop is None or not loop.whole or loop.calls < SURE or loop.calls % EVERY == 0:
            return self._checked(loop, model, call, *args, **kwargs)
        _here.skips = True
        try:
            return call(*args, **kwargs)
        except RuntimeError as error:
            if _RECOMPILED not in str(error):
                raise
        finally:
            _here.skips = False
        # What no longer held showed before anything had run.
        return self._checked(loop, model, call, *args, **kwargs)

    @staticmethod
    def _checked(
        loop: Repeats | None,
        model: nn.Module | None,
        call: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if loop is None:
            return call(*args, **kwargs)
        found, run = run_noting_graph(lambda: call(*args, **kwargs))
        loop.whole = run is not None
        before, loop.checked = loop.checked, None
        if model is not None and not args and can_replay():
            loop.checked = CheckedStep.or_none(call, kwargs, run, found)
        if loop.checked is None or before is None or not before.is_repeated_by(loop.checked):
            loop.replay = None
        elif model is not None and loop.replay is None and loop.calls >= SURE - 1:
            cache = next(kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None)
            loop.replay = Replay(loop.checked, model, cache.layers)
        return found


@functools.cache
def _install() -> None:
    """Let Dynamo ask `_here` as well; where it has no such question all calls are checked."""
    asked: Callable[[], bool] | None = getattr(eval_frame, _STANCE, None)
    if asked is not None:
        setattr(eval_frame, _STANCE, lambda: _here.skips or asked())


_here = Here()
