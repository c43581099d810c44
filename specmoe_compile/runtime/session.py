"""The one object that ops name: what an offloaded model needs at run time, and who runs its layers.

A session owns a store and an `Engine`, which takes the steps of the MoE layers on one device. It
serialises the calls, marks them for profilers, tells an observer, and closes everything. Graphs
name a session by its handle, a small integer that is the same in every process that makes its
sessions in the same order, so that compiled code can be reused.

Shape letters: T tokens, E experts, K top-k, P predicted per token, H hidden, L MoE layers.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.options import SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.predict.predictions import Predictions
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.runtime.engine import Engine
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.system import nvtx
from specmoe_compile.system.nvtx import layer_range

_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


def get_session(handle: int) -> Session:
    """Return an open session.

    Raises:
        SpecMoEError: it was closed, or there never was one with this handle.
    """
    session = _sessions.get(handle)
    if session is None:
        raise SpecMoEError(
            f"Session {handle} is closed or was never opened: its model's experts are gone. Load"
            " the model again."
        )
    return session


def _renew_after_fork() -> None:
    """In a forked process: no thread of the parent's is there, and none holds a lock."""
    for session in list(_sessions.values()):
        session.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


class RoutingObserver(Protocol):
    """What a session tells of each layer step; tensors are the caller's and may be reused."""

    def routed(self, layer: int, ids: Tensor, weights: Tensor, *, split: bool) -> None:
        """Take a layer's routing, [T, K] each, before it runs; `split` if a wait came before."""

    def predicted(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """Take a prediction of a layer's routing, [T, P] each."""


class Session:
    """An engine with its store; a context manager that closes both.

    One caller runs at a time; another waits for it. Two generations that interleave are exact, and
    slower, since they share slots. In a forked process it is used on by itself, if its engine can:
    memory is copied on write, and reader threads start again.

    Attributes:
        handle: what graphs call the session by: the lowest number that is free, so that compiled
            code is found again by a process that opens and closes sessions in turn.
        engine: what runs the layers.
        layers: the MoE layers, by ordinal; empty for a model that was not offloaded.
        top_k: K, the most experts of a token.
        speculation: what happens to predictions, as `configure` set it.
        compiling_bytes: RAM that has to be free when its model is compiled for a CPU; 0 where the
            caller chose how much is left.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        layers: Sequence[ExpertsLayer] = (),
        store: ExpertStore | None = None,
        top_k: int = 0,
    ) -> None:
        """Enter the table of open sessions, which does not keep the session alive.

        Args:
            engine: closed with the session.
            layers: by MoE layer ordinal.
            store: records of all of them, closed with the session; None where nothing is offloaded.
            top_k: K.
        """
        self.engine = engine
        self.layers = tuple(layers)
        self.top_k = top_k
        self._observer: RoutingObserver | None = None
        self.speculation = SessionOptions()
        self.compiling_bytes = 0
        self._store = store
        self._last_stats: Stats | None = None
        self._direct = engine.direct_steps
        self._lock: AbstractContextManager[Any] = (
            threading.RLock() if self._direct is None else self._direct.lock
        )
        self._is_forked = False
        self._lookahead = nvtx.OpenRange()
        self.handle = next(number for number in itertools.count() if number not in _sessions)
        _sessions[self.handle] = self
        if self._direct is not None:
            self._direct.enter(self.handle)
        self._choose_steps()
        # Runs at exit too, and does not keep the session alive.
        self._finalizer = weakref.finalize(self, _close_parts, self.handle, engine, store)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def observer(self) -> RoutingObserver | None:
        """Is told every routing and prediction; None for nobody."""
        return self._observer

    @observer.setter
    def observer(self, observer: RoutingObserver | None) -> None:
        with self._lock:
            self._observer = observer
            self._choose_steps()

    def _choose_steps(self) -> None:
        """Let native code take steps unless something here has to see each of them."""
        if self._direct is not None:
            seen = self._observer is not None or nvtx.enabled()
            self._direct.turn_off(seen or self.engine.predictions.remembers)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Close the engine and the store; a caller that waits for a read gets a TransferError.

        The modules forget the handle, which another session may get: code that was compiled for
        this one is guarded by it and cannot reach the other's experts.
        """
        self.engine.interrupt()
        with self._lock:
            if self.closed:
                return
            for layer in self.layers:
                layer.module._specmoe_session = None  # type: ignore[assignment]
            # The garbage collector may call this in the middle of a trace, whose tensors are fake.
            with _disable_current_modes():
                try:
                    self._last_stats = self.engine.stats()
                finally:
                    self._finalizer()

    @property
    def store(self) -> ExpertStore:
        """The slow tier.

        Raises:
            SpecMoEError: the model was not offloaded.
        """
        if self._store is None:
            raise SpecMoEError("This model's experts are not offloaded: it has no expert store.")
        return self._store

    @property
    def device(self) -> torch.device:
        """Where experts are computed."""
        return self.engine.device

    @property
    def default_vectors(self) -> DefaultVectors:
        """Mean outputs of the experts."""
        return self.engine.default_vectors

    @property
    def predictions(self) -> Predictions:
        """What predicts where no router does."""
        return self.engine.predictions

    @property
    def stats(self) -> Stats:
        """Counters so far, as a copy; those at the end once it is closed. May wait for a GPU."""
        if self._last_stats is not None:
            return self._last_stats
        self.check_open()
        with self._lock:
            return self.engine.stats()

    def reset_stats(self) -> None:
        """Set the counters to zero; the cache keeps what it holds."""
        with self._lock:
            self.check_open()
            self.engine.reset_stats()

    def configure(self, speculation: SessionOptions) -> None:
        """Set what happens to predictions, from now on.

        Raises:
            ValueError, SpecMoEError: the engine cannot do what one of the options asks for.
        """
        with self._lock:
            self.check_open()
            self.engine.configure(speculation)
            self.engine.predictions.use(speculation.kind)
            self.speculation = speculation
            if speculation.nvtx:
                nvtx.enable()
            self._choose_steps()

    def experts(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run the experts of one layer, fetching what is missing.

        Args:
            layer: MoE layer ordinal.
            x: [T, H] float, on the session's device, like the others.
            ids: [T, K] int64 or int32.
            weights: [T, K] float.

        Returns:
            [T, H] in the dtype of `x`: the weighted sum over K.

        Raises:
            TransferError: an expert could not be read; the session goes on.
            SpecMoEError: the session is closed, or an id is out of range.
        """
        with self._lock, layer_range(layer, "experts"):
            self.check_open()
            if self.observer is not None:
                self.observer.routed(layer, ids, weights, split=False)
            return self.engine.demand(layer, x, ids, weights)

    def run_own_experts(
        self, layer: int, x: Tensor, slots: Tensor, weights: Tensor, counted: Mapping[int, Tensor]
    ) -> Tensor:
        """Run a token's experts of a layer that is one of the engine's `foreign_ids`.

        Args:
            layer, x, weights: see `experts`; T is 1.
            slots: [1, K], -1 for experts of other ranks.
            counted: slots of all such layers that ran since they were last counted.
        """
        with self._lock, layer_range(layer, "experts"):
            self.check_open()
            if self.observer is not None:
                ids = torch.where(slots < 0, self.engine.foreign_ids[layer], slots)
                self.observer.routed(layer, ids, weights, split=False)
            return self.engine.run_own(layer, x, slots, weights, counted)

    def blend_default_vectors(
        self, layer: int, ids: Tensor, weights: Tensor, like: Tensor
    ) -> Tensor:
        """Weighted sum of the experts' default vectors: [T, K], [T, K] -> [T, H] like `like`."""
        with self._lock, layer_range(layer, "blend"):
            self._lookahead.open(layer, "lookahead")
            return self.engine.blend(layer, ids, weights, like)

    def predict_experts(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Predict a layer without its router: [T, H] -> ids and weights [T, P], for a prefetch.

        Raises:
            SpecMoEError: the layer has no trained network.
        """
        with self._lock, layer_range(layer, "predict"):
            return self.engine.predict(layer, state, width)

    def start_prefetch(self, layer: int, ids: Tensor, weights: Tensor) -> int:
        """Take a prediction of a layer's routing and start reading what it lacks; never blocks.

        Args:
            layer: MoE layer ordinal.
            ids: [T, P] int64 or int32, predicted experts.
            weights: [T, P] float, their router weights.

        Returns:
            The ticket's number, for `wait_prefetch`.
        """
        self._lookahead.close()
        with self._lock, layer_range(layer, "prefetch"):
            self.check_open()
            if self.observer is not None:
                self.observer.predicted(layer, ids, weights)
            return self.engine.start(layer, ids, weights)

    def plan_step(self, layers: Sequence[int], edges: Sequence[int], ids: Tensor) -> list[bool]:
        """Decide which of `layers` speculate in the step that begins.

        Args:
            layers: MoE layer ordinals.
            edges: pairs in one list: a layer, and one that can be predicted from it.
            ids: [T, K], the experts of the first of `layers`.
        """
        with self._lock:
            self.check_open()
            return self.engine.plan(layers, edges, ids)

    def wait_prefetch(self, ticket: int, layer: int, ids: Tensor) -> int:
        """Settle a ticket against the true ids, [T, K]; issues demand reads, never blocks.

        Returns:
            The step's number, for `run_resident_experts` and `correct_experts`.
        """
        with self._lock, layer_range(layer, "wait"):
            self.check_open()
            return self.engine.settle(ticket, layer, ids)

    def run_resident_experts(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, state: int
    ) -> Tensor:
        """Run the experts that are there: unweighted outputs [T, K, H]; never blocks.

        Rows of experts that are still being read are undefined. Arguments are those of `experts`.
        """
        with self._lock, layer_range(layer, "resident"):
            self.check_open()
            if self.observer is not None:
                self.observer.routed(layer, ids, weights, split=True)
            return self.engine.run(state, layer, x, ids, weights)

    def correct_experts(
        self, layer: int, partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor, state: int
    ) -> Tensor:
        """Run the experts that arrive late and sum over K: [T, K, H] -> [T, H].

        Raises:
            TransferError: an expert could not be read; the session goes on.
        """
        with self._lock, layer_range(layer, "correct"):
            self.check_open()
            return self.engine.correct(state, layer, partial, x, ids, weights)

    def check_open(self) -> None:
        """Raise `SpecMoEError` if the session is closed, or another process's."""
        if self._is_forked:
            raise SpecMoEError(
                "This process was forked from one that computes the model on a GPU, and CUDA does"
                " not work in a forked process: load the model in this process, or start processes"
                " with the method 'spawn'."
            )
        if self.closed:
            raise SpecMoEError("The session is closed: load the model again.")

    def renew_after_fork(self) -> None:
        """In a forked process: forget a lock that a thread of the parent's holds.

        An engine that is of the parent alone is refused from now on, and what it has left alone.
        """
        if self._direct is None:
            self._lock = threading.RLock()
        else:
            self._direct.renew_after_fork()
        if not self.engine.survives_fork:
            self._is_forked = True
            self._finalizer.detach()


def _close_parts(handle: int, engine: Engine, store: ExpertStore | None) -> None:
    _sessions.pop(handle, None)
    try:
        engine.close()
    finally:
        if store is not None:
            store.close()
