"""The engine of experts that are computed on the CPU: from slots, or from a store in RAM itself.

Shape letters: T tokens, K top-k, P predicted per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from specmoe_compile.options import SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.runtime.cache.double_buffers import DoubleBuffers
from specmoe_compile.runtime.cache.eviction import DEFAULT_POLICY, Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cache.statistics import LayerStats, Stats
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.cpu.fast_tier import FastTier
from specmoe_compile.runtime.cpu.native import layer as native
from specmoe_compile.runtime.cpu.native.steps import NO_FILE, LayerPlace, NativeSteps
from specmoe_compile.runtime.cpu.native.torch_ops import use_native_steps
from specmoe_compile.runtime.cpu.residency import InPlaceResidency, Residency
from specmoe_compile.runtime.cpu.speculator import Speculator
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.matching import check_store
from specmoe_compile.runtime.transfer.disk import DiskTransfer


class CpuEngine(Speculator):
    """Runs layer steps; owns slots, staging and reader threads.

    Attributes:
        cache: `ExpertCache`, or `DoubleBuffers` without a cache; None when experts are in place.
        transfer: reads the store; None when experts are in place.
    """

    device = torch.device("cpu")
    plans_steps = True
    resident_layers: frozenset[int] = frozenset()
    foreign_ids: Mapping[int, int] = MappingProxyType({})  # planning costs nothing here
    survives_fork = True

    def __init__(
        self,
        layers: Sequence[ExpertsLayer],
        store: ExpertStore,
        *,
        expert_cache_bytes: int | None,
        cache_policy: Policy = DEFAULT_POLICY,
        reader_threads: int = 4,
        top_k: int,
    ) -> None:
        """Reserve memory and start the reader threads; arguments are those of `open_session`."""
        check_store(layers, store)
        runners = tuple(
            ExpertRunner(
                layer.module,
                layer.layout,
                layer.num_experts,
                native=True,
                is_slice=layer.is_slice,
            )
            for layer in layers
        )
        stats = tuple(LayerStats() for _ in layers)
        self.cache: ExpertCache | DoubleBuffers | None = None
        self.direct_steps: NativeSteps | None = None
        self.transfer: DiskTransfer | None = None
        self._store = store
        self._busy_before_ms = 0.0
        residency: Residency
        if expert_cache_bytes is None:
            if store.kind != "ram":
                raise ValueError(
                    "A store on disk needs an expert cache: give expert_cache in bytes, or 0 for"
                    " none but the buffers of two layers."
                )
            residency = InPlaceResidency(store, runners, stats)
        else:
            self.transfer = DiskTransfer(store, reader_threads=reader_threads)
            self._tier = FastTier(
                store,
                self.transfer,
                runners,
                stats,
                top_k=top_k,
                reader_threads=reader_threads,
            )
            residency = self._in_slots(expert_cache_bytes, cache_policy)
        vectors = DefaultVectors(
            # One row more, zero for ever, for the experts of other ranks.
            [runner.num_experts + (runner.foreign is not None) for runner in runners],
            [runner.hidden_size for runner in runners],
        )
        super().__init__(residency, runners, stats, vectors)
        self.direct_steps = self._direct_steps_or_none(reader_threads)

    def _direct_steps_or_none(self, readers: int) -> NativeSteps | None:
        """Share the tables with C++, which then takes steps alone; None where it cannot."""
        engine = native.engine_or_none() if any(r.native for r in self._runners) else None
        if engine is None or isinstance(self.cache, DoubleBuffers):
            return None
        if not use_native_steps(engine.library):
            return None
        store = self._store
        reads = store.direct_reads_or_none()
        places = [
            LayerPlace(
                runner.native,
                runner.num_experts,
                self.residency.address(layer),
                store.layouts[layer].record_bytes,
                self.residency.marks(layer),
                self.default_vectors.tables[layer],
                self.default_vectors.counts[layer],
                0 if reads is None else reads.offsets[layer],
                None if reads is None or reads.verified is None else reads.verified[layer],
                runner.foreign is not None,
            )
            for layer, runner in enumerate(self._runners)
        ]
        fd = NO_FILE if reads is None else reads.fd
        residency = self.residency
        return NativeSteps(
            engine,
            places,
            self.cache,
            vectors=self.default_vectors,
            staging=residency.staging if isinstance(residency, CachedResidency) else None,
            file=fd,
            readers=readers,
        )

    @property
    def prefetch_pays(self) -> bool:
        # With a cache little is left to hide, and predicting takes a layer's time: more than it
        # brings, in C++ and in Python (docs/results/cpu-disk.md). Without one it was found to pay
        # (docs/results/speculation.md).
        return isinstance(self.cache, DoubleBuffers)

    @property
    def multiplies(self) -> bool:
        return self.direct_steps is not None

    def demand(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with self._taken_over(layer):
            return super().demand(layer, x, ids, weights)

    def plan(self, layers: Sequence[int], edges: Sequence[int], ids: Tensor) -> list[bool]:
        with self._taken_over(layers[-1]):
            return super().plan(layers, edges, ids)

    def start(self, layer: int, ids: Tensor, weights: Tensor) -> int:
        with self._taken_over(layer):
            return super().start(layer, ids, weights)

    def settle(self, number: int, layer: int, ids: Tensor) -> int:
        with self._taken_over(layer):
            return super().settle(number, layer, ids)

    def correct(
        self, number: int, layer: int, partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        with self._taken_over(layer):
            return super().correct(number, layer, partial, x, ids, weights)

    @contextmanager
    def _taken_over(self, layer: int) -> Iterator[None]:
        """A part of a step that is Python's."""
        self._take_over()
        try:
            yield
        finally:
            self._hand_over(layer)

    def _take_over(self) -> None:
        """End what C++ has under way, and take in what it did since Python's last step."""
        if (direct := self.direct_steps) is not None:
            direct.quiesce()
            self._drain()

    def _drain(self) -> None:
        if (direct := self.direct_steps) is not None:
            direct.drain(self._stats)
            self._learning_turn = direct.control.learning_turn

    def _hand_over(self, layer: int) -> None:
        """Tell C++ what it has to leave alone."""
        if (direct := self.direct_steps) is not None:
            control = direct.control
            control.learns = self.learns_from_decode
            control.learning_turn = self._learning_turn
            direct.set_busy(layer, self._state is not None or self.residency.is_busy(layer))

    def _in_slots(self, cache_bytes: int, policy: Policy) -> CachedResidency:
        if cache_bytes == 0:
            return self._buffered(SessionOptions())
        residency = self._tier.cached(cache_bytes, policy)
        self.cache = residency.table
        return residency

    def _buffered(self, speculation: SessionOptions) -> CachedResidency:
        residency = self._tier.buffered(speculation)
        self.cache = residency.table
        return residency

    @property
    def fetches(self) -> bool:
        return self.cache is not None

    def configure(self, speculation: SessionOptions) -> None:
        """Take the options from now on.

        Raises:
            ValueError: a transfer that only a GPU has, or int8 arithmetic for experts without it.
        """
        if speculation.transfer != "auto":
            raise ValueError(
                f"transfer={speculation.transfer!r} is for experts that are computed on a GPU, and"
                " these are computed on the CPU: leave it out, or load the model with"
                " device='cuda'."
            )
        native.use_cpu_math(speculation.cpu_math, [runner.native for runner in self._runners])
        if isinstance(self.cache, DoubleBuffers) and _buffers_differ(self.config, speculation):
            native.settle()  # the old buffers go away
            self.use(self._buffered(speculation))
        self.use_options(speculation)
        # Where nothing is fetched nothing is predicted, and nobody asks for a default vector.
        self.learns_from_decode = speculation.predicts and self.fetches
        if self.direct_steps is not None:
            self._take_over()
            # Guesses of other ranks' experts are Python's.
            is_slice = any(runner.foreign is not None for runner in self._runners)
            self.direct_steps.use_options(self.config, self.misses, in_parts=not is_slice)
            self.direct_steps.control.learns = self.learns_from_decode

    def blend(self, layer: int, ids: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        return self.default_vectors.blend(layer, ids, weights, like)

    def predict(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return self.predictions.predict(layer, state, width)

    def stats(self) -> Stats:
        self._drain()
        return Stats(
            layers=tuple(layer.copy() for layer in self._stats),
            fast_tier_bytes=self.residency.fast_tier_bytes,
            store_bytes=self._store.total_bytes,
            store=self._store.kind,
            experts=self._store.numbers,
            record_bytes=self._store.record_bytes,
            read_busy_ms=self._busy_ms() - self._busy_before_ms,
            eviction=self.cache.followed() if isinstance(self.cache, ExpertCache) else (),
        )

    def reset_stats(self) -> None:
        self._drain()
        for layer in self._stats:
            layer.reset()
        self._busy_before_ms = self._busy_ms()

    def _busy_ms(self) -> float:
        own = self.direct_steps.busy_ms if self.direct_steps is not None else 0.0
        return own + (self.transfer.busy_ms if self.transfer is not None else 0.0)

    def interrupt(self) -> None:
        """End the reader threads: a call that waits for a read gets a TransferError."""
        if self.transfer is not None:
            self.transfer.close()

    def run_own(
        self, layer: int, x: Tensor, slots: Tensor, weights: Tensor, counted: Mapping[int, Tensor]
    ) -> Tensor:
        raise AssertionError("there are no foreign_ids that a graph could mark")

    def close(self) -> None:
        if self.direct_steps is not None:
            self.direct_steps.leave()
        self.interrupt()
        native.settle()


def open_session(
    layers: Sequence[ExpertsLayer],
    store: ExpertStore,
    *,
    expert_cache_bytes: int | None,
    cache_policy: Policy = DEFAULT_POLICY,
    reader_threads: int = 4,
    top_k: int,
) -> Session:
    """Open the session of experts that are computed on the CPU.

    Args:
        layers: by MoE layer ordinal; their modules say how an expert is computed.
        store: records of all of them; closed with the session.
        expert_cache_bytes: bytes of slots over all layers; 0 for no cache, only the buffers of
            two layers; None, with a store in RAM, to compute from the store itself.
        cache_policy: which expert leaves a full cache.
        reader_threads: reads in flight at most.
        top_k: K.

    Raises:
        ValueError: the cache does not hold one token's experts, or the store is another model's.
    """
    engine = CpuEngine(
        layers,
        store,
        expert_cache_bytes=expert_cache_bytes,
        cache_policy=cache_policy,
        reader_threads=reader_threads,
        top_k=top_k,
    )
    return Session(engine, layers=layers, store=store, top_k=top_k)


def _buffers_differ(one: SessionOptions, other: SessionOptions) -> bool:
    return (one.lookahead, one.prefetch_width) != (other.lookahead, other.prefetch_width)
