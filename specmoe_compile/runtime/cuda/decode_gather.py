"""Decode with transfer `gather`: the device plans the cache and reads the records it lacks itself.

Nothing waits on the host, and nothing that the host does depends on a routing: a CUDA graph can
capture the step. A gather waits for an event recorded after its plan, which comes after all earlier
readers of the layer's slots; compute waits for every gather of a layer before its correction, so
that nothing of a layer is in flight between its steps.

Shape letters: T tokens, E experts, K top-k, P predicted per token, H hidden, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from specmoe_compile.kernels.correct_experts.op import correct_experts
from specmoe_compile.kernels.expert_form import ExpertBank, ExpertForm
from specmoe_compile.kernels.expert_mlp.op import run_resident_experts
from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.kernels.plan_cache.op import MAX_CHOICES, CachePlanTensors, plan_cache
from specmoe_compile.runtime.cuda.streams import Streams
from specmoe_compile.runtime.cuda.tables import DeviceCache
from specmoe_compile.runtime.layout import ExpertLayout


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


class DecodeStep(NamedTuple):
    """One layer step between its demand plan and its correction.

    Attributes:
        plan: slots of its choices.
        skipped: [T, K] int32, experts that a default vector stands in for, else -1; or None.
    """

    plan: CachePlanTensors
    skipped: Tensor | None


class GatherDecoder:
    """Plans, gathers, runs and corrects the layers of decode steps."""

    def __init__(
        self,
        cache: DeviceCache,
        records: Sequence[Tensor],
        layouts: Sequence[ExpertLayout],
        forms: Sequence[ExpertForm],
        streams: Streams,
        *,
        policy: Literal["lru", "lfu"],
    ) -> None:
        """Tie the parts together; none is owned.

        Args:
            cache: slots and tables.
            records: of each layer in host memory, [E, record_bytes] uint8; page-locked on CUDA.
            layouts, forms: of each layer.
            streams: the session's.
            policy: which expert leaves a full cache.
        """
        self._cache = cache
        self._records = records
        self._forms = forms
        self._streams = streams
        self._policy = policy
        self._banks = [
            ExpertBank.from_views(layout.bank_views(bank))
            for layout, bank in zip(layouts, cache.banks, strict=True)
        ]
        self._prefetched: list[_Fetch | None] = [None] * len(records)
        self._demanded: list[_Fetch | None] = [None] * len(records)

    def fits(self, layer: int, choices: int) -> bool:
        """Whether the experts of so many choices always have slots; from shapes alone."""
        needed = min(choices, len(self._records[layer]))
        return 0 < choices <= MAX_CHOICES and needed <= self._cache.slots[layer]

    def prefetch(self, layer: int, ids: Tensor) -> None:
        """Start gathering predicted experts, [T, P]; -1 is nobody."""
        self.join(layer)
        self._prefetched[layer] = self._fetch("prefetch", layer, ids)

    def demand(self, layer: int, ids: Tensor, skipped: Tensor | None = None) -> DecodeStep:
        """Start gathering the experts of a routing, [T, K]; -1 is nobody."""
        self._wait(self._demanded, layer)
        early = self._prefetched[layer]
        slots, experts = self._cache.slots[layer], len(self._records[layer])
        needed = min(ids.numel(), experts)
        if early is not None and slots < min(needed + early.experts, experts):
            # Slots under transfer are no victims, and the others might not do.
            self._wait(self._prefetched, layer)
            with self._streams.on("compute"):
                self._cache.tables[layer].pending.zero_()
        self._demanded[layer] = fetch = self._fetch("demand", layer, ids)
        return DecodeStep(fetch.plan, skipped)

    def run(self, layer: int, step: DecodeStep, x: Tensor, weights: Tensor) -> Tensor:
        """Unweighted outputs of the experts that are there, [T, K, H]."""
        with self._streams.on("compute"):
            return run_resident_experts(
                x, step.plan.present, weights, self._banks[layer], self._forms[layer]
            )

    def correct(
        self,
        layer: int,
        step: DecodeStep,
        partial: Tensor,
        x: Tensor,
        weights: Tensor,
        vectors: Tensor,
    ) -> Tensor:
        """Run the late experts and sum over K: [T, K, H] -> [T, H].

        Args:
            layer: MoE layer ordinal.
            step: from `demand`.
            partial: from `run`.
            x: [T, H].
            weights: [T, K].
            vectors: default vectors, [E, H] float32.
        """
        self.join(layer)
        with self._streams.on("compute"):
            return correct_experts(
                partial,
                x,
                step.plan.late,
                weights,
                self._banks[layer],
                self._forms[layer],
                skipped=step.skipped,
                default_vectors=None if step.skipped is None else vectors,
            )

    def join(self, layer: int) -> None:
        """Make compute wait for what is in flight into a layer's slots."""
        self._wait(self._demanded, layer)
        self._wait(self._prefetched, layer)

    def _wait(self, fetches: list[_Fetch | None], layer: int) -> None:
        fetch, fetches[layer] = fetches[layer], None
        if fetch is not None:
            self._streams.wait("compute", fetch.event)

    def _plan(self, layer: int, ids: Tensor, *, speculative: bool) -> CachePlanTensors:
        tables = self._cache.tables[layer]
        return plan_cache(ids, tables, policy=self._policy, speculative=speculative)

    def _fetch(self, stream: Literal["demand", "prefetch"], layer: int, ids: Tensor) -> _Fetch:
        with self._streams.on("compute"):
            plan = self._plan(layer, ids, speculative=stream == "prefetch")
        self._streams.wait(stream, self._streams.record("compute"))
        with self._streams.on(stream):
            gather_experts(
                [self._records[layer]],
                [self._cache.banks[layer]],
                plan.fill_experts,
                plan.fill_slots,
                plan.fill_count,
            )
        return _Fetch(
            self._streams.record(stream), plan, min(ids.numel(), len(self._records[layer]))
        )


def skip_weak_misses(
    ids: Tensor, weights: Tensor, slot_of: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out absent experts whose weight is below the threshold for each of their tokens.

    Args:
        ids: [T, K] int64 or int32.
        weights: [T, K] float.
        slot_of: [E] int32, slot of each expert or -1.
        threshold: router weight.

    Returns:
        ids to fetch, [T, K], -1 where left out; experts left out, [T, K] int32, else -1; and their
        number, [] int64.
    """
    heaviest = heaviest_by_expert(ids, weights, slot_of.shape[0])
    weak = (slot_of < 0) & (heaviest >= 0) & (heaviest < threshold)
    left_out = weak[ids.long()]
    kept = torch.where(left_out, -1, ids)
    skipped = torch.where(left_out, ids, -1).int()
    return kept, skipped, weak.sum()


def heaviest_by_expert(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Largest weight of each expert, [T, K], [T, K] -> [E] float32; -1 for those not chosen."""
    heaviest = torch.full((experts,), -1.0, device=ids.device)
    return heaviest.scatter_reduce_(0, ids.reshape(-1).long(), weights.reshape(-1).float(), "amax")
