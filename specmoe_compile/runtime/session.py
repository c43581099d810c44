"""The one owner of what an offloaded model needs at run time, and the table of open sessions.

Graphs name a session by its handle, a small integer that is the same in every process that makes
its sessions in the same order, so that compiled code can be reused.

Shape letters: T tokens, E experts, K top-k, H hidden, L MoE layers.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.options import SpeculationConfig
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.predict.predictions import Predictions
from specmoe_compile.runtime.cache.double_buffers import DoubleBuffers
from specmoe_compile.runtime.cache.eviction import DEFAULT_POLICY, Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cache.statistics import LayerStats, Stats
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.cpu.fast_tier import FastTier
from specmoe_compile.runtime.cpu.native.layer import settle, use_cpu_math
from specmoe_compile.runtime.cpu.residency import InPlaceResidency, Residency
from specmoe_compile.runtime.cpu.speculator import Speculator
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.transfer.disk import DiskTransfer
from specmoe_compile.system import nvtx
from specmoe_compile.system.nvtx import layer_range

if TYPE_CHECKING:
    from specmoe_compile.runtime.cpu.live_session import LiveSession

_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


def register_session(session: Session | LiveSession) -> int:
    """Enter a session into the table, which does not keep it alive, and return its handle.

    The handle is the lowest number that is free, so that compiled code is found again by a process
    that opens and closes sessions in turn.
    """
    handle = next(number for number in itertools.count() if number not in _sessions)
    _sessions[handle] = cast(Session, session)  # a LiveSession has what a graph may call
    return handle


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


def session_of(model: nn.Module) -> Session:
    """Return the session of an offloaded model, compiled or not, or of one inside a wrapper.

    Raises:
        SpecMoEError: the model is not offloaded, or its session is closed.
    """
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    modules = inner.modules() if isinstance(inner, nn.Module) else ()
    handles = (
        m.__dict__.get("_specmoe_session") for m in modules if "_specmoe_layer" not in m.__dict__
    )
    handle = next((handle for handle in handles if handle is not None), None)
    if handle is None:
        raise SpecMoEError(
            f"{type(inner).__name__} is not an offloaded model: load it with"
            " specmoe_compile.from_pretrained or pass it to specmoe_compile.offload"
        )
    return get_session(handle)


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
    """Store, cache, transfer and counters of one model; a context manager that closes them.

    One caller runs at a time; another waits for it. Two generations that interleave are exact, and
    slower, since they share slots. In a forked process it is used on by itself: its memory is
    copied on write, and its reader threads start again.

    Attributes:
        handle: what graphs call the session by.
        layers: the MoE layers, by ordinal.
        store: the slow tier; closed with the session.
        cache: `ExpertCache`, or `DoubleBuffers` without a cache; None when experts are in place.
        device: where experts are computed.
        top_k: K, the most experts of a token.
        default_vectors: mean outputs of the experts, learned while running.
        observer: is told every routing and prediction; None for nobody.
        predictions: trained networks and past choices, for predictors that are no router.
        plans_steps: whether a graph may branch on `plan_step`.
    """

    plans_steps = True

    def __init__(
        self,
        layers: Sequence[ExpertsLayer],
        store: ExpertStore,
        *,
        device: torch.device | str = "cpu",
        expert_cache_bytes: int | None,
        cache_policy: Policy = DEFAULT_POLICY,
        reader_threads: int = 4,
        top_k: int,
    ) -> None:
        """Reserve memory and start the reader threads.

        Args:
            layers: by MoE layer ordinal; their modules say how an expert is computed.
            store: records of all of them.
            device: "cpu".
            expert_cache_bytes: bytes of slots over all layers; 0 for no cache, only the buffers of
                two layers; None, with a store in RAM, to compute from the store itself.
            cache_policy: which expert leaves a full cache.
            reader_threads: reads in flight at most.
            top_k: K.

        Raises:
            ValueError: the cache does not hold one token's experts, or the store is another
                model's.
        """
        self.device = torch.device(device)
        if self.device.type != "cpu":
            raise ValueError(f"device={device!r}: this session computes on the CPU only.")
        self.layers = tuple(layers)
        self.store = store
        self.top_k = top_k
        self.cache: ExpertCache | DoubleBuffers | None = None
        self.observer: RoutingObserver | None = None
        _check_store(self.layers, store)
        self._runners = tuple(
            ExpertRunner(layer.module, layer.layout, layer.num_experts, native=True)
            for layer in self.layers
        )
        self._layer_stats = tuple(LayerStats() for _ in self.layers)
        self._lock = threading.RLock()
        self._lookahead = nvtx.OpenRange()
        self._busy_before_ms = 0.0
        self._transfer: DiskTransfer | None = None
        self._residency = self._make_residency(expert_cache_bytes, cache_policy, reader_threads)
        self.default_vectors = DefaultVectors(
            [runner.num_experts for runner in self._runners],
            [runner.hidden_size for runner in self._runners],
        )
        self.predictions = Predictions(len(self.layers))
        self._speculator = Speculator(
            self._residency, self._runners, self._layer_stats, self.default_vectors
        )
        self.handle = register_session(self)
        # Runs at exit too, and does not keep the session alive.
        self._finalizer = weakref.finalize(self, _close_parts, self.handle, self._transfer, store)

    def _make_residency(
        self, cache_bytes: int | None, policy: Policy, reader_threads: int
    ) -> Residency:
        if cache_bytes is None:
            if self.store.kind != "ram":
                raise ValueError(
                    "A store on disk needs an expert cache: give expert_cache in bytes, or 0 for"
                    " none but the buffers of two layers."
                )
            return InPlaceResidency(self.store, self._runners, self._layer_stats)
        self._transfer = DiskTransfer(self.store, reader_threads=reader_threads)
        self._tier = FastTier(
            self.store,
            self._transfer,
            self._runners,
            self._layer_stats,
            top_k=self.top_k,
            reader_threads=reader_threads,
        )
        if cache_bytes == 0:
            return self._buffered(SpeculationConfig())
        residency = self._tier.cached(cache_bytes, policy)
        self.cache = residency.table
        return residency

    def _buffered(self, speculation: SpeculationConfig) -> CachedResidency:
        residency = self._tier.buffered(speculation)
        self.cache = residency.table
        return residency

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """End the reader threads and close the store; a waiting caller gets a TransferError.

        The modules forget the handle, which another session may get: code that was compiled for
        this one is guarded by it and cannot reach the other's experts.
        """
        if not self.closed:
            for layer in self.layers:
                layer.module._specmoe_session = None  # type: ignore[assignment]
        self._finalizer()

    @property
    def stats(self) -> Stats:
        """Counters so far, as a copy."""
        return Stats(
            layers=tuple(layer.copy() for layer in self._layer_stats),
            fast_tier_bytes=self._residency.fast_tier_bytes,
            store_bytes=self.store.total_bytes,
            store=self.store.kind,
            experts=self.store.numbers,
            record_bytes=self.store.record_bytes,
            read_busy_ms=self._busy_ms() - self._busy_before_ms,
            eviction=self.cache.followed() if isinstance(self.cache, ExpertCache) else (),
        )

    def configure(self, speculation: SpeculationConfig) -> None:
        """Set what happens to predictions, from now on.

        Raises:
            ValueError: a transfer that only a GPU has, or int8 arithmetic for experts without it.
        """
        if speculation.transfer != "auto":
            raise ValueError(
                f"transfer={speculation.transfer!r} is for experts that are computed on a GPU, and"
                " these are computed on the CPU: leave it out, or load the model with"
                " device='cuda'."
            )
        with self._lock:
            use_cpu_math(speculation.cpu_math, [runner.native for runner in self._runners])
            previous = self._speculator.config
            if isinstance(self.cache, DoubleBuffers) and _buffers_differ(previous, speculation):
                settle()  # the old buffers go away
                self._residency = self._buffered(speculation)
                self._speculator.use(self._residency)
            self._speculator.config = speculation
            self._speculator.learns_from_decode = speculation.prefetch
            self.predictions.use(speculation.predictor)
            if speculation.nvtx:
                nvtx.enable()

    @property
    def speculation(self) -> SpeculationConfig:
        """What happens to predictions, as `configure` set it."""
        return self._speculator.config

    def reset_stats(self) -> None:
        """Set the counters to zero; the cache keeps what it holds."""
        with self._lock:
            for layer in self._layer_stats:
                layer.reset()
            self._busy_before_ms = self._busy_ms()

    def _busy_ms(self) -> float:
        return self._transfer.busy_ms if self._transfer is not None else 0.0

    def experts(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run the experts of one layer, fetching what is missing.

        Args:
            layer: MoE layer ordinal.
            x: [T, H] float, CPU.
            ids: [T, K] int64 or int32, CPU.
            weights: [T, K] float, CPU.

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
            self.predictions.note(layer, ids)
            return self._speculator.demand(layer, x, ids, weights)

    def blend_default_vectors(
        self, layer: int, ids: Tensor, weights: Tensor, like: Tensor
    ) -> Tensor:
        """Weighted sum of the experts' default vectors: [T, K], [T, K] -> [T, H] like `like`."""
        with self._lock, layer_range(layer, "blend"):
            self._lookahead.open(layer, "lookahead")
            return self.default_vectors.blend(layer, ids, weights, like)

    def predict_experts(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Predict a layer without its router: [T, H] -> ids and weights [T, P], for a prefetch.

        Raises:
            SpecMoEError: the layer has no trained network.
        """
        with self._lock, layer_range(layer, "predict"):
            return self.predictions.predict(layer, state, width)

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
            return self._speculator.start(layer, ids, weights)

    def plan_step(self, layers: Sequence[int], edges: Sequence[int], ids: Tensor) -> list[bool]:
        """Decide which of `layers` speculate in the step that begins.

        Args:
            layers: MoE layer ordinals.
            edges: pairs in one list: a layer, and one that can be predicted from it.
            ids: [T, K], the experts of the first of `layers`.
        """
        with self._lock:
            self.check_open()
            return self._speculator.plan(layers, edges)

    def wait_prefetch(self, ticket: int, layer: int, ids: Tensor) -> int:
        """Settle a ticket against the true ids, [T, K]; issues demand reads, never blocks.

        Returns:
            The step's number, for `run_resident_experts` and `correct_experts`.
        """
        with self._lock, layer_range(layer, "wait"):
            self.check_open()
            self.predictions.note(layer, ids)
            return self._speculator.settle(ticket, layer, ids)

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
            return self._speculator.run(state, layer, x, ids, weights)

    def correct_experts(
        self, layer: int, partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor, state: int
    ) -> Tensor:
        """Run the experts that arrive late and sum over K: [T, K, H] -> [T, H].

        Raises:
            TransferError: an expert could not be read; the session goes on.
        """
        with self._lock, layer_range(layer, "correct"):
            self.check_open()
            return self._speculator.correct(state, layer, partial, x, ids, weights)

    def check_open(self) -> None:
        """Raise `SpecMoEError` if the session is closed."""
        if self.closed:
            raise SpecMoEError("The session is closed: load the model again.")

    def renew_after_fork(self) -> None:
        """In a forked process: forget a lock that a thread of the parent's holds."""
        self._lock = threading.RLock()


def _check_store(layers: Sequence[ExpertsLayer], store: ExpertStore) -> None:
    """Raise `ValueError` when a store does not hold the experts of these layers."""
    wanted = [(layer.num_experts, layer.layout) for layer in layers]
    stored = list(zip(store.num_experts, store.layouts, strict=True))
    if wanted != stored:
        raise ValueError(
            f"The expert store holds {len(stored)} MoE layers with other shapes than the model's"
            f" {len(wanted)}: it was made from another model."
        )


def _buffers_differ(one: SpeculationConfig, other: SpeculationConfig) -> bool:
    return (one.lookahead, one.prefetch_width) != (other.lookahead, other.prefetch_width)


def _close_parts(handle: int, transfer: DiskTransfer | None, store: ExpertStore) -> None:
    _sessions.pop(handle, None)
    if transfer is not None:
        transfer.close()
    settle()
    store.close()
