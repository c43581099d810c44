"""What `plan_cache` computes: the Python policy of the runtime, on tables that are tensors.

Shape letters: T tokens, K top-k, E experts, S slots, N = min(T * K, E).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.slot_table import NOBODY, CachePlan, ExpertCache


def plan_cache_reference(
    ids: Tensor,
    slot_of: Tensor,
    expert_of: Tensor,
    last_use: Tensor,
    scores: Tensor,
    pending: Tensor,
    unused: Tensor,
    clock: Tensor,
    regret: Tensor,
    counters: Tensor,
    *,
    policy: Policy,
    speculative: bool,
    max_fills: int,
    fill_limit: Tensor | None = None,
    spare: int = 0,
    spare_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Read the tables, let `ExpertCache` plan, write them back; waits for the device.

    Args and returns: see `plan_cache`.

    Raises:
        ValueError: an id is more than E.
    """
    given: list[int] = ids.reshape(-1).tolist()
    choices = [NOBODY if expert == slot_of.shape[0] else expert for expert in given]
    if max(choices) >= slot_of.shape[0]:
        raise ValueError(
            f"specmoe_kernels::plan_cache: ids holds expert {max(choices)}, but slot_of has"
            f" {slot_of.shape[0]} experts"
        )
    tables = (slot_of, expert_of, last_use, scores, clock, regret)
    cache = _cache_of(*tables, policy=policy, spare=spare)
    in_flight: list[int] = pending.tolist()
    if fill_limit is not None:
        max_fills = min(max_fills, int(fill_limit))
    plan = cache.plan(
        0,
        _within_budget(choices, cache.slot_of[0], max_fills),
        pinned_slots=[slot for slot, flag in enumerate(in_flight) if flag],
        speculative=speculative,
    )
    columns = (
        cache.slot_of[0],
        cache.expert_of[0],
        cache.last_use[0],
        cache.scores[0].table.tolist(),
        cache.clock,
        cache.scores[0].regret.tolist(),
    )
    for table, values in zip(tables, columns, strict=True):
        _write(table, values)
    late_hits = [slot for _, slot in plan.hits if in_flight[slot]]
    _keep_books(plan, pending, unused, counters, len(late_hits), speculative=speculative)

    sent = dict(plan.fills)
    if not speculative:
        sent |= {e: spare_from + place for place, e in enumerate(plan.bypassed[: cache.spare])}
    present, late = _split_choices(choices, cache.slot_of[0], set(late_hits), sent)
    order = [expert for expert in dict.fromkeys(choices) if expert in sent]
    rest = [NOBODY] * (min(len(choices), slot_of.shape[0]) - len(order))
    return (
        _int32(present, ids).view(ids.shape),
        _int32(late, ids).view(ids.shape),
        _int32(order + rest, ids),
        _int32([sent[expert] for expert in order] + rest, ids),
        _int32([len(order)], ids),
    )


def _cache_of(
    slot_of: Tensor,
    expert_of: Tensor,
    last_use: Tensor,
    scores: Tensor,
    clock: Tensor,
    regret: Tensor,
    *,
    policy: Policy,
    spare: int,
) -> ExpertCache:
    """The Python policy with what the tables say."""
    cache = ExpertCache(
        num_experts=[slot_of.shape[0]], slots=[expert_of.shape[0]], policy=policy, spare=spare
    )
    cache.slot_of[0] = array("q", slot_of.tolist())
    cache.expert_of[0] = array("q", expert_of.tolist())
    cache.last_use[0] = array("q", last_use.tolist())
    cache.scores[0].table[:] = scores.tolist()
    cache.scores[0].regret[:] = regret.tolist()
    cache.clock[0] = int(clock)
    return cache


def _keep_books(
    plan: CachePlan,
    pending: Tensor,
    unused: Tensor,
    counters: Tensor,
    late_hits: int,
    *,
    speculative: bool,
) -> None:
    """Write down which slots are in flight and which were never used, and count."""
    in_flight: list[int] = pending.tolist()
    untouched: list[int] = unused.tolist()
    hit_slots = [slot for _, slot in plan.hits]
    fill_slots = [slot for _, slot in plan.fills]
    wasted = sum(untouched[slot] for slot in fill_slots)
    useful = 0
    if not speculative:
        useful = sum(untouched[slot] for slot in hit_slots)
        in_flight = [0] * len(in_flight)
        for slot in hit_slots:
            untouched[slot] = 0
    for slot in fill_slots:
        in_flight[slot] = untouched[slot] = int(speculative)
    misses = len(plan.fills) + len(plan.bypassed)
    demand = [1, len(plan.hits), late_hits, misses, len(plan.bypassed)]
    added = [
        *([0] * len(demand) if speculative else demand),
        len(plan.evicted),
        len(plan.fills) if speculative else 0,
        useful,
        wasted,
    ]
    _write(pending, in_flight)
    _write(unused, untouched)
    counters += counters.new_tensor(added)


def _within_budget(choices: Sequence[int], slot_of: Sequence[int], max_fills: int) -> list[int]:
    """Experts chosen, in order, without the absent ones that come after the first `max_fills`."""
    experts = dict.fromkeys(expert for expert in choices if expert >= 0)
    absent = [expert for expert in experts if slot_of[expert] == NOBODY]
    left_out = set(absent[max_fills:])
    return [expert for expert in experts if expert not in left_out]


def _split_choices(
    choices: Sequence[int], slot_of: Sequence[int], late_slots: set[int], sent: Mapping[int, int]
) -> tuple[list[int], list[int]]:
    """Slot of each choice that is there, and place of each that will be; -1 elsewhere."""
    slots = [slot_of[expert] if expert >= 0 else NOBODY for expert in choices]
    is_late = [
        slot in late_slots or expert in sent for expert, slot in zip(choices, slots, strict=True)
    ]
    present = [NOBODY if late else slot for slot, late in zip(slots, is_late, strict=True)]
    late = [
        sent.get(expert, slot) if later else NOBODY
        for expert, slot, later in zip(choices, slots, is_late, strict=True)
    ]
    return present, late


def _write(table: Tensor, values: Sequence[Any]) -> None:
    table.copy_(table.new_tensor(values))


def _int32(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)
