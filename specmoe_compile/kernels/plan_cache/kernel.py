"""Triton kernel of `plan_cache`: one program that holds a layer's tables in registers.

Lookups are done for all choices at once; only misses are served one after the other, because each
takes the best victim that is left. So a step whose experts are all there costs no loop, and a step
that misses has a transfer to wait for that takes far longer than the loop.

Shape letters: C = T * K choices, E experts, S slots, N = min(C, E).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Keys hold an expert or a slot, both below 512, in their lowest bits. Above a slot there is room
# for 2**53 plans.
INDEX_BITS = tl.constexpr(9)
INDEX_MASK = tl.constexpr(511)
OCCUPIED_BIT = tl.constexpr(62)
LAST_KEY = tl.constexpr(2**63 - 1)
LAST_ORDER = tl.constexpr(2**31 - 1)


@triton.jit
def find_slots(ids, slot_of, choices, CHOICES: tl.constexpr, E: tl.constexpr):
    """Expert and slot of each choice, int32; -1 for none."""
    expert = tl.load(ids + choices, mask=choices < CHOICES, other=-1)
    wanted = (expert >= 0) & (expert < E)
    expert = tl.where(wanted, expert, -1).to(tl.int32)
    return expert, tl.load(slot_of + expert, mask=wanted, other=-1)


@triton.jit
def find_uses(
    ids,
    slot_of,
    slot,
    slots,
    CHOICES: tl.constexpr,
    E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Whether each slot's expert is among the choices, bool [BLOCK_S].

    More than CHUNK choices are looked up again, part by part: all pairs of choices and slots at
    once would not fit the registers.
    """
    if BLOCK_C <= CHUNK:
        uses = tl.max((slot[:, None] == slots[None, :]).to(tl.int32), axis=0)
    else:
        uses = tl.zeros([BLOCK_S], tl.int32)
        for start in range(0, CHOICES, CHUNK):
            choices = start + tl.arange(0, CHUNK)
            _, part = find_slots(ids, slot_of, choices, CHOICES, E)
            found = tl.max((part[:, None] == slots[None, :]).to(tl.int32), axis=0)
            uses = tl.maximum(uses, found)
    return uses > 0


# The tables are rows of larger ones: how they are aligned differs from layer to layer, and must not
# compile a kernel each.
@triton.jit(
    do_not_specialize_on_alignment=[
        *("ids", "slot_of", "expert_of", "last_use", "count", "pending", "unused", "clock"),
        *("counters", "present", "late", "fill_experts", "fill_slots", "fill_count", "fill_limit"),
    ]
)
def plan_cache_kernel(
    ids,
    slot_of,
    expert_of,
    last_use,
    count,
    pending,
    unused,
    clock,
    counters,
    present,
    late,
    fill_experts,
    fill_slots,
    fill_count,
    fill_limit,
    CHOICES: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    COUNTERS: tl.constexpr,
    LFU: tl.constexpr,
    AGEING: tl.constexpr,
    BYPASS: tl.constexpr,
    SPECULATIVE: tl.constexpr,
    MOST_FILLS: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Decide and update one layer's plan; grid (1,).

    Args: see `plan_cache`; ids int32 or int64, last_use, clock and counters int64, others int32.
    """
    choices = tl.arange(0, BLOCK_C)
    slots = tl.arange(0, BLOCK_S)
    real = slots < S
    expert, slot = find_slots(ids, slot_of, choices, CHOICES, E)
    held_before = tl.load(expert_of + slots, mask=real, other=-1)
    used = tl.load(last_use + slots, mask=real, other=0)
    uses_before = tl.load(count + slots, mask=real, other=0)
    in_flight = tl.load(pending + slots, mask=real, other=0) != 0
    untouched = tl.load(unused + slots, mask=real, other=0) != 0
    now = tl.load(clock) + 1
    which = tl.arange(0, 16)
    totals = tl.load(counters + which, mask=which < COUNTERS, other=0)
    arriving = tl.load(pending + slot, mask=slot >= 0, other=0) != 0
    hit = find_uses(ids, slot_of, slot, slots, CHOICES, E, BLOCK_C, CHUNK, BLOCK_S)

    uses = uses_before
    if LFU:
        uses = tl.where(now % AGEING == 0, uses >> 1, uses)
    occupied = (held_before >= 0).to(tl.int64)
    free = real & ~hit & ~in_flight
    if BYPASS:
        free = free & (held_before < 0)
    # Smallest key leaves first. Keys differ, since each has its slot in it.
    age = (used << INDEX_BITS) | slots
    if LFU:
        rank = tl.where(free, (occupied << 32) | uses.to(tl.int64), LAST_KEY)
    else:
        age = tl.where(free, (occupied << OCCUPIED_BIT) | age, LAST_KEY)

    places = tl.where(arriving, slot, -1)
    held = held_before
    experts_to_fill = tl.full([BLOCK_C], -1, tl.int32)
    slots_to_fill = tl.full([BLOCK_C], -1, tl.int32)
    fills = tl.zeros([], tl.int32)
    misses = tl.zeros([], tl.int32)
    most = tl.full([], MOST_FILLS, tl.int32)
    if LIMITED:
        most = tl.minimum(most, tl.load(fill_limit))
    absent = (expert >= 0) & (slot < 0)
    order = tl.where(absent, (choices << INDEX_BITS) | expert, LAST_ORDER)
    first = tl.min(order, axis=0)
    while (first != LAST_ORDER) & (fills < most):
        missing = first & INDEX_MASK
        if LFU:
            lowest = tl.min(rank, axis=0)
            victim = tl.min(tl.where(rank == lowest, age, LAST_KEY), axis=0)
            found = lowest != LAST_KEY
        else:
            victim = tl.min(age, axis=0)
            found = victim != LAST_KEY
        # Without a victim no slot is equal to -1, and nothing below changes.
        taken = tl.where(found, (victim & INDEX_MASK).to(tl.int32), -1)
        is_taken = slots == taken
        held = tl.where(is_taken, missing, held)
        if LFU:
            rank = tl.where(is_taken, LAST_KEY, rank)
        else:
            age = tl.where(is_taken, LAST_KEY, age)
        is_next = (choices == fills) & found
        experts_to_fill = tl.where(is_next, missing, experts_to_fill)
        slots_to_fill = tl.where(is_next, taken, slots_to_fill)
        places = tl.where(expert == missing, taken, places)
        order = tl.where(expert == missing, LAST_ORDER, order)
        fills += found.to(tl.int32)
        misses += 1
        first = tl.min(order, axis=0)

    filled = held != held_before
    evicted = filled & (held_before >= 0)
    touched = filled
    added = tl.where(which == 5, tl.sum(evicted.to(tl.int32), axis=0), 0)
    added += tl.where(which == 8, tl.sum((filled & untouched).to(tl.int32), axis=0), 0)
    if SPECULATIVE:
        added += tl.where(which == 6, fills, 0)
    else:
        touched = touched | hit
        uses += hit.to(tl.int32)
        added += tl.where(which == 0, 1, 0)
        added += tl.where(which == 1, tl.sum(hit.to(tl.int32), axis=0), 0)
        added += tl.where(which == 2, tl.sum((hit & in_flight).to(tl.int32), axis=0), 0)
        added += tl.where(which == 3, misses, 0)
        added += tl.where(which == 4, misses - fills, 0)
        added += tl.where(which == 7, tl.sum((hit & untouched).to(tl.int32), axis=0), 0)
    uses = tl.where(filled, 1, uses)

    # No warp may store what another has yet to load.
    tl.debug_barrier()
    tl.store(slot_of + held_before, -1, mask=evicted)
    tl.store(slot_of + held, slots, mask=filled)
    tl.store(expert_of + slots, held, mask=filled)
    tl.store(last_use + slots, tl.zeros([BLOCK_S], tl.int64) + now, mask=touched)
    tl.store(count + slots, uses, mask=uses != uses_before)
    if SPECULATIVE:
        tl.store(pending + slots, 1, mask=filled)
        tl.store(unused + slots, 1, mask=filled)
    else:
        tl.store(pending + slots, 0, mask=in_flight)
        tl.store(unused + slots, 0, mask=touched & untouched)
    tl.store(clock, now)
    tl.store(counters + which, totals + added, mask=(which < COUNTERS) & (added != 0))
    tl.store(present + choices, tl.where(arriving, -1, slot), mask=choices < CHOICES)
    tl.store(late + choices, places, mask=choices < CHOICES)
    # N fills fit: CHOICES and E bound them both.
    tl.store(fill_experts + choices, experts_to_fill, mask=(choices < CHOICES) & (choices < E))
    tl.store(fill_slots + choices, slots_to_fill, mask=(choices < CHOICES) & (choices < E))
    tl.store(fill_count, fills)


def block_sizes(choices: int, slots: int) -> tuple[int, int, int, int]:
    """BLOCK_C, CHUNK, BLOCK_S and warps.

    One warp where it holds all pairs of choices and slots: its reductions need no shared memory.
    """
    block_c = triton.next_power_of_2(choices)
    block_s = max(triton.next_power_of_2(slots), 16)
    chunk = 16
    return block_c, chunk, block_s, 1 if min(block_c, chunk) * block_s <= 1024 else 4


def launch_plan(
    ids: Tensor,
    slot_of: Tensor,
    expert_of: Tensor,
    last_use: Tensor,
    count: Tensor,
    pending: Tensor,
    unused: Tensor,
    clock: Tensor,
    counters: Tensor,
    present: Tensor,
    late: Tensor,
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
    *,
    policy: str,
    ageing_period: int,
    bypass: bool,
    speculative: bool,
    most_fills: int,
    fill_limit: Tensor | None = None,
) -> None:
    """Launch `plan_cache_kernel` on the current stream; arguments as checked by `plan_cache`."""
    block_c, chunk, block_s, num_warps = block_sizes(ids.numel(), expert_of.shape[0])
    plan_cache_kernel[(1,)](
        ids,
        slot_of,
        expert_of,
        last_use,
        count,
        pending,
        unused,
        clock,
        counters,
        present,
        late,
        fill_experts,
        fill_slots,
        fill_count,
        fill_count if fill_limit is None else fill_limit,
        CHOICES=ids.numel(),
        E=slot_of.shape[0],
        S=expert_of.shape[0],
        COUNTERS=counters.shape[0],
        LFU=policy == "lfu",
        AGEING=ageing_period if policy == "lfu" else 1,
        BYPASS=bypass,
        SPECULATIVE=speculative,
        MOST_FILLS=most_fills,
        LIMITED=fill_limit is not None,
        BLOCK_C=block_c,
        CHUNK=chunk,
        BLOCK_S=block_s,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
