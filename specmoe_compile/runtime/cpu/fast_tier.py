"""Puts a residency together: slots and their table for a cache, or the buffers of a few layers.

A session does so with memory that experts are read into; a replay does the same with memory that
is only counted, and so decides what a session would.

Shape letters: K top-k, S slots per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cache.double_buffers import DoubleBuffers
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache, slots_per_layer
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.cpu.memory import Allocate, SlotMemory, StagingRing
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.transfer.base import Transfer
from specmoe_compile.system.aligned import aligned_empty


class FastTier:
    """What residencies of one store have in common: transfer, staging ring, counters."""

    def __init__(
        self,
        store: ExpertStore,
        transfer: Transfer,
        runners: Sequence[ExpertRunner],
        stats: Sequence[LayerStats],
        *,
        top_k: int,
        reader_threads: int,
        allocate: Allocate = aligned_empty,
        residency: Callable[..., CachedResidency] = CachedResidency,
    ) -> None:
        """Reserve nothing yet; nothing is owned.

        Args:
            store: where experts are read from.
            transfer: what reads them.
            runners, stats: of each layer.
            top_k: K.
            reader_threads: reads in flight at most.
            allocate: makes memory of a size in bytes, [bytes] uint8.
            residency: what is made; takes the arguments of `CachedResidency`.
        """
        self._store = store
        self._transfer = transfer
        self._runners = runners
        self._stats = stats
        self._top_k = top_k
        self._allocate = allocate
        self._make = residency
        # Enough that a reader never waits for the expert that is being computed.
        self._buffers = reader_threads + 2
        self._ring: StagingRing | None = None

    def cached(self, cache_bytes: int, policy: Policy, *, bypasses: bool = True) -> CachedResidency:
        """Return a residency with S slots per layer, as many as the bytes pay for.

        Args:
            cache_bytes: of all slots.
            policy: who leaves them.
            bypasses: whether the staging ring, which has K records more for that, may have what
                the policy does not keep.

        Raises:
            ValueError: they do not hold one token's experts.
        """
        store = self._store
        slots = slots_per_layer(cache_bytes, store.layouts, store.num_experts, self._top_k)
        spare = self._top_k if bypasses and policy == "adaptive" else 0
        # A bypassed expert waits for no buffer.
        spare = min(self._staging(more=spare).buffers, spare)
        table = ExpertCache(num_experts=store.num_experts, slots=slots, policy=policy, spare=spare)
        memory = SlotMemory(self._runners, store.layouts, slots, allocate=self._allocate)
        return self._residency(table, memory)

    def buffered(self, speculation: SessionOptions) -> CachedResidency:
        """Return a residency without a cache, with the buffers that the predictions need."""
        width = max(self._top_k, speculation.prefetch_width or 0)
        slots = tuple(min(width, count) for count in self._store.num_experts)
        memory = SlotMemory(
            self._runners,
            self._store.layouts,
            slots,
            shared_banks=speculation.lookahead + 1,
            allocate=self._allocate,
        )
        return self._residency(DoubleBuffers(bank_of=memory.bank_of, slots=slots), memory)

    def _staging(self, more: int = 0) -> StagingRing:
        """The ring, which is made with so many buffers more."""
        if self._ring is None:
            count = self._buffers + more
            self._ring = StagingRing(self._store.layouts, buffers=count, allocate=self._allocate)
        return self._ring

    def _residency(self, table: ExpertCache | DoubleBuffers, memory: SlotMemory) -> CachedResidency:
        return self._make(
            self._store,
            table,
            memory,
            self._staging(),
            self._transfer,
            self._runners,
            self._stats,
        )
