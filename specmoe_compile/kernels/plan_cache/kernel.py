"""Triton kernel of `plan_cache`: one program that holds a layer's tables in registers.

Lookups are done for all choices at once; only misses are served one after the other, because each
takes the slot of least worth that is left. So a step whose experts are all there costs no loop, and
a step that misses has a transfer to wait for that takes far longer than the loop.

Shape letters: C = T * K choices, E experts, S slots, N = min(C, E), B spare places.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specmoe_compile.kernels.plan_cache.scores import (
    CANDIDATES,
    INDEX_BITS,
    JUDGED_BITS,
    LAST_KEY,
    LFU_CANDIDATE,
    are_chosen,
    count_lacked,
    judge,
    load_scores,
    store_scores,
    worth_of,
)

INDEX_MASK = tl.constexpr(511)
OCCUPIED_BIT = tl.constexpr(62)
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
        *("ids", "slot_of", "expert_of", "last_use", "scores", "pending", "unused", "clock"),
        *(
            "regret",
            "counters",
            "present",
            "late",
            "fill_experts",
            "fill_slots",
            "fill_count",
            "fill_limit",
        ),
    ],
    do_not_specialize=["spare_from"],
)
def plan_cache_kernel(
    ids,
    slot_of,
    expert_of,
    last_use,
    scores,
    pending,
    unused,
    clock,
    regret,
    counters,
    present,
    late,
    fill_experts,
    fill_slots,
    fill_count,
    fill_limit,
    spare_from,
    CHOICES: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    COUNTERS: tl.constexpr,
    SCORED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    SPECULATIVE: tl.constexpr,
    MAX_FILLS: tl.constexpr,
    LIMITED: tl.constexpr,
    SPARE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Decide and update one layer's plan; grid (1,).

    Args: see `plan_cache`; ids int32 or int64, last_use, clock and counters int64, others int32.
        SPARE is B where this plan may use them, else 0.
    """
    choices = tl.arange(0, BLOCK_C)
    slots = tl.arange(0, BLOCK_S)
    real = slots < S
    expert, slot = find_slots(ids, slot_of, choices, CHOICES, E)
    held_before = tl.load(expert_of + slots, mask=real, other=-1)
    used = tl.load(last_use + slots, mask=real, other=0)
    in_flight = tl.load(pending + slots, mask=real, other=0) != 0
    untouched = tl.load(unused + slots, mask=real, other=0) != 0
    now = tl.load(clock) + 1
    which = tl.arange(0, 16)
    totals = tl.load(counters + which, mask=which < COUNTERS, other=0)
    arriving = tl.load(pending + slot, mask=slot >= 0, other=0) != 0
    hit = find_uses(ids, slot_of, slot, slots, CHOICES, E, BLOCK_C, CHUNK, BLOCK_S)

    if SCORED:
        candidate = tl.full([], LFU_CANDIDATE, tl.int64)
        there = (held_before >= 0) & (held_before < E)
        fast, middle, slow, seen = load_scores(scores, held_before, there, E)
        if SPARE > 0:
            own = expert >= 0
            own_fast, own_middle, own_slow, own_seen = load_scores(scores, expert, own, E)
        if not SPECULATIVE:
            experts = tl.arange(0, BLOCK_E)
            all_fast, all_middle, all_slow, all_seen = load_scores(scores, experts, experts < E, E)
            are_used = are_chosen(ids, experts, CHOICES, CHUNK, BLOCK_E)
        if ADAPTIVE:
            candidate = tl.load(regret + CANDIDATES)
            if not SPECULATIVE:
                misses_of = tl.load(regret + tl.arange(0, CANDIDATES))
                if (now & JUDGED_BITS) == 0:
                    lacked_one = tl.zeros([], tl.int32)
                    lacked_other = tl.zeros([], tl.int32)
                    if S < E:
                        lacked_one, lacked_other = count_lacked(
                            ids, scores, all_fast, all_middle, all_slow, all_seen,
                            CHOICES, E, S, BLOCK_C, CHUNK, BLOCK_E,
                        )  # fmt: skip
                    misses_of, candidate = judge(misses_of, candidate, lacked_one, lacked_other)
        worth = worth_of(fast, middle, slow, seen, held_before, candidate, hit, now, SPECULATIVE)
        if SPARE > 0:
            own_worth = worth_of(
                own_fast, own_middle, own_slow, own_seen,
                expert, candidate, own, now, SPECULATIVE,
            )  # fmt: skip
            own_key = (own.to(tl.int64) << OCCUPIED_BIT) | own_worth
    else:
        worth = (used << INDEX_BITS) | slots
    occupied = (held_before >= 0).to(tl.int64)
    free = real & ~hit & ~in_flight & (held_before < E)
    # Smallest key leaves first; slots that hold nothing in their order. Keys differ.
    key = tl.where(occupied > 0, (occupied << OCCUPIED_BIT) | worth, slots.to(tl.int64))
    key = tl.where(free, key, LAST_KEY)

    places = tl.where(arriving, slot, -1)
    held = held_before
    experts_to_fill = tl.full([BLOCK_C], -1, tl.int32)
    slots_to_fill = tl.full([BLOCK_C], -1, tl.int32)
    fills = tl.zeros([], tl.int32)
    misses = tl.zeros([], tl.int32)
    spared = tl.zeros([], tl.int32)
    most = tl.full([], MAX_FILLS, tl.int32)
    if LIMITED:
        most = tl.minimum(most, tl.load(fill_limit))
    absent = (expert >= 0) & (slot < 0)
    order = tl.where(absent, (choices << INDEX_BITS) | expert, LAST_ORDER)
    first = tl.min(order, axis=0)
    while (first != LAST_ORDER) & (fills < most):
        missing = first & INDEX_MASK
        least = tl.min(key, axis=0)
        found = least != LAST_KEY
        is_taken = (key == least) & found
        if SPARE > 0:
            # Worth less than all that may leave, or nothing may.
            passes = tl.max(tl.where(expert == missing, own_key, -1), axis=0) < least
            passes = passes & (spared < SPARE)
            is_taken = is_taken & ~passes
        taken = tl.max(tl.where(is_taken, slots, -1), axis=0)
        if SPARE > 0:
            taken = tl.where(passes, spare_from + spared, taken)
            found = found | passes
            spared += passes.to(tl.int32)
        held = tl.where(is_taken, missing, held)
        key = tl.where(is_taken, LAST_KEY, key)
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
        added += tl.where(which == 0, 1, 0)
        added += tl.where(which == 1, tl.sum(hit.to(tl.int32), axis=0), 0)
        added += tl.where(which == 2, tl.sum((hit & in_flight).to(tl.int32), axis=0), 0)
        added += tl.where(which == 3, misses, 0)
        added += tl.where(which == 4, misses - fills + spared, 0)
        added += tl.where(which == 7, tl.sum((hit & untouched).to(tl.int32), axis=0), 0)

    # No warp may store what another has yet to load.
    tl.debug_barrier()
    if SCORED and not SPECULATIVE:
        store_scores(scores, experts, all_fast, all_middle, all_slow, are_used, now, E)
        if ADAPTIVE:
            tl.store(regret + tl.arange(0, CANDIDATES), misses_of)
            tl.store(regret + CANDIDATES, candidate)
    tl.store(slot_of + held_before, -1, mask=evicted)
    tl.store(slot_of + held, slots, mask=filled)
    tl.store(expert_of + slots, held, mask=filled)
    tl.store(last_use + slots, tl.zeros([BLOCK_S], tl.int64) + now, mask=touched)
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


def block_sizes(choices: int, slots: int, experts: int = 0) -> tuple[int, int, int, int]:
    """BLOCK_C, CHUNK, BLOCK_S and warps.

    One warp where it holds all pairs of choices and slots, and of choices and experts where those
    are ranked: its reductions need no shared memory.

    Args:
        choices: C. slots: S.
        experts: E of a policy that ranks them, else 0.
    """
    block_c = triton.next_power_of_2(choices)
    block_s = max(triton.next_power_of_2(slots), 16)
    chunk = min(block_c, 16)
    pairs = chunk * max(block_s, triton.next_power_of_2(max(experts, 1)))
    return block_c, chunk, block_s, 1 if pairs <= 1024 else 4


def launch_plan(
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
    present: Tensor,
    late: Tensor,
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
    *,
    policy: str,
    speculative: bool,
    max_fills: int,
    fill_limit: Tensor | None = None,
    spare: int = 0,
    spare_from: int = 0,
) -> None:
    """Launch `plan_cache_kernel` on the current stream; arguments as checked by `plan_cache`."""
    ranked = 0 if policy == "lru" else slot_of.shape[0]
    block_c, chunk, block_s, num_warps = block_sizes(ids.numel(), expert_of.shape[0], ranked)
    plan_cache_kernel[(1,)](
        ids,
        slot_of,
        expert_of,
        last_use,
        scores,
        pending,
        unused,
        clock,
        regret,
        counters,
        present,
        late,
        fill_experts,
        fill_slots,
        fill_count,
        fill_count if fill_limit is None else fill_limit,
        spare_from,
        CHOICES=ids.numel(),
        E=slot_of.shape[0],
        S=expert_of.shape[0],
        COUNTERS=counters.shape[0],
        SCORED=policy != "lru",
        ADAPTIVE=policy == "adaptive",
        SPECULATIVE=speculative,
        MAX_FILLS=max_fills,
        LIMITED=fill_limit is not None,
        SPARE=0 if speculative or policy != "adaptive" else spare,
        BLOCK_C=block_c,
        CHUNK=chunk,
        BLOCK_S=block_s,
        BLOCK_E=triton.next_power_of_2(slot_of.shape[0]),
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
