"""Decode with transfer `gather`: the device plans the cache and reads the records it lacks itself.

Nothing waits on the host, and nothing that the host does depends on a routing: a CUDA graph can
capture the step. A gather waits for an event recorded after its plan, which comes after all earlier
readers of the layer's slots; compute waits for every gather of a layer before its correction, so
that nothing of a layer is in flight between its steps.

Shape letters: T tokens, E experts, K top-k, P predicted per token, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.kernels.note_prompt.op import note_prompt
from specmoe_compile.kernels.plan_cache.op import MAX_CHOICES, CachePlanTensors, plan_cache
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cuda.decoder import Decoder, DecodeStep
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.cuda.stats import layer_stats
from specmoe_compile.runtime.policy.misses import weak_misses_on_device
from specmoe_compile.system.nvtx import layer_range


class _Fetch(NamedTuple):
    """A gather in flight.

    Attributes:
        event: reached when it has ended.
        plan: its lists; kept until compute waited, since the allocator knows one stream only.
        experts: most experts that it brings.
    """

    event: Any
    plan: CachePlanTensors
    experts: int


def waits_for_prefetch(slots: int, needed: int, ahead: int, experts: int) -> bool:
    """Whether a layer's demand has to wait for its prefetch before it is planned.

    Slots under transfer are not evicted, and the others might not do.

    Args:
        slots: S. experts: E.
        needed: most experts that are demanded. ahead: most that the prefetch brings.
    """
    return slots < min(needed + ahead, experts)


class GatherDecoder(Decoder):
    """Decodes without the host.

    Attributes:
        captured: whether a CUDA graph holds steps that use the tables.
        limit: [1] int32 on the device, records that a prefetch may bring; None for no limit.
    """

    def __init__(self, parts: DecoderParts, records: Sequence[Tensor], *, policy: Policy) -> None:
        """Tie the parts together; none is owned.

        Args:
            parts: see `Decoder`.
            records: of each layer in host memory, [E, record_bytes] uint8; page-locked on CUDA.
            policy: which expert leaves a full cache.
        """
        super().__init__(parts)
        self.captured = False
        self.limit: Tensor | None = None
        self._records = records
        self._policy = policy
        self._prefetched: list[_Fetch | None] = [None] * len(records)
        self._demanded: list[_Fetch | None] = [None] * len(records)
        self._last_demand: Any = None

    def prefetch(self, layer: int, ids: Tensor, max_records: int = MAX_CHOICES) -> None:
        self.join(layer)
        if self._last_demand is not None:
            # What the step waits for now has the link to itself.
            self._streams.wait("prefetch", self._last_demand)
        # The first choices of all tokens come first.
        ids = ids.t().contiguous()
        self._prefetched[layer] = self._fetch("prefetch", layer, ids, min(max_records, MAX_CHOICES))

    def demand(
        self, layer: int, ids: Tensor, weights: Tensor | None = None, threshold: float = 0.0
    ) -> DecodeStep:
        skipped = None
        if weights is not None:
            with self._streams.on("compute"):
                slot_of = self._cache.tables[layer].slot_of
                ids, skipped, number = weak_misses_on_device(ids, weights, slot_of, threshold)
                self._cache.skipped[layer] += number
        self._wait(self._demanded, layer)
        early = self._prefetched[layer]
        slots, experts = self._cache.slots[layer], self._num_experts[layer]
        needed = min(ids.numel(), experts)
        if early is not None and waits_for_prefetch(slots, needed, early.experts, experts):
            self._wait(self._prefetched, layer)
            with self._streams.on("compute"):
                self._cache.tables[layer].pending.zero_()
        with layer_range(layer, "fetch"):
            self._demanded[layer] = fetch = self._fetch("demand", layer, ids)
            self._last_demand = fetch.event
        return DecodeStep(fetch.plan.present, fetch.plan.late, skipped)

    def note_prompt(self, layer: int, ids: Tensor) -> None:
        if self._policy == "adaptive":
            tables = self._cache.tables[layer]
            with self._streams.on("compute"):
                note_prompt(ids, tables.scores, tables.clock)

    def wait(self, layer: int, step: DecodeStep) -> None:
        self.join(layer)

    def join(self, layer: int) -> None:
        self._wait(self._demanded, layer)
        self._wait(self._prefetched, layer)

    def stats(self) -> tuple[LayerStats, ...]:
        return layer_stats(self._cache, self._record_bytes)

    def followed(self) -> tuple[str, ...]:
        return self._cache.followed(self._policy)

    def reset_stats(self) -> None:
        self._cache.reset_counters()

    def forget(self) -> None:
        for layer in range(len(self._records)):
            self.join(layer)
        self._cache.forget()

    def _slots_were_read(self, layer: int) -> None:
        pass  # a later gather waits for all that compute has got until then

    def _wait(self, fetches: list[_Fetch | None], layer: int) -> None:
        fetch, fetches[layer] = fetches[layer], None
        if fetch is not None:
            self._streams.wait("compute", fetch.event)

    def _plan(
        self, layer: int, ids: Tensor, *, speculative: bool, max_records: int
    ) -> CachePlanTensors:
        return plan_cache(
            ids,
            self._cache.tables[layer],
            policy=self._policy,
            speculative=speculative,
            max_fills=max_records,
            spare=0 if speculative else self._spare_places(layer),
            spare_from=self._cache.spare_from[layer],
            fill_limit=self.limit if speculative else None,
        )

    def _fetch(
        self,
        stream: Literal["demand", "prefetch"],
        layer: int,
        ids: Tensor,
        max_records: int = MAX_CHOICES,
    ) -> _Fetch:
        self.captured |= self._streams.capturing
        with self._streams.on("compute"):
            plan = self._plan(layer, ids, speculative=stream == "prefetch", max_records=max_records)
        self._streams.wait(stream, self._streams.record("compute"))
        with self._streams.on(stream):
            gather_experts(
                [self._records[layer]],
                [self._cache.places[layer]],
                plan.fill_experts,
                plan.fill_slots,
                plan.fill_count,
            )
        return _Fetch(
            self._streams.record(stream), plan, min(ids.numel(), self._num_experts[layer])
        )
