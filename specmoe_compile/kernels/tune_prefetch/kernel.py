"""Triton kernel of `tune_prefetch`.

Shape letters: A amounts that are tried, at most 8.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from specmoe_compile.kernels.tune_prefetch import reference as words

LAST = tl.constexpr(words.LAST)
PLACE = tl.constexpr(words.PLACE)
ARM = tl.constexpr(words.ARM)
ROUND = tl.constexpr(words.ROUND)
HOLD = tl.constexpr(words.HOLD)
HOLDS = tl.constexpr(words.HOLDS)
SHORTEST = tl.constexpr(words.SHORTEST)
BEGUN = tl.constexpr(words.BEGUN)
SUMS = tl.constexpr(words.SUMS)
COUNTS = tl.constexpr(words.COUNTS)
ALIVE = tl.constexpr(words.ALIVE)
MAX_AMOUNTS = tl.constexpr(words.MAX_AMOUNTS)
BLOCK_STEPS = tl.constexpr(words.BLOCK_STEPS)
ROUNDS = tl.constexpr(words.ROUNDS)
FIRST_HOLD = tl.constexpr(words.FIRST_HOLD)
MAX_DOUBLINGS = tl.constexpr(words.MAX_DOUBLINGS)
OUTLIER = tl.constexpr(words.OUTLIER)
FIRST_MARGIN = tl.constexpr(words.FIRST_MARGIN)
LEAST_MARGIN = tl.constexpr(words.LEAST_MARGIN)
NEVER = tl.constexpr(1 << 62)


@triton.jit
def tune_prefetch_kernel(
    state,
    limit,
    amounts,
    now_ptr,
    A: tl.constexpr,
    NOW_GIVEN: tl.constexpr,
):
    """Take in the last step and choose for the next; grid (1,).

    Args: see `tune_prefetch`; state and now int64, limit and amounts int32.
    """
    if NOW_GIVEN:  # noqa: SIM108 - Triton leaves out the branch that is not taken
        now = tl.load(now_ptr)
    else:
        now = globaltimer()
    arms = tl.arange(0, MAX_AMOUNTS)
    last = tl.load(state + LAST)
    place = tl.load(state + PLACE)
    arm = tl.load(state + ARM)
    rounds = tl.load(state + ROUND)
    hold = tl.load(state + HOLD)
    holds = tl.load(state + HOLDS)
    shortest = tl.load(state + SHORTEST)
    begun = tl.load(state + BEGUN)
    sums = tl.load(state + SUMS + arms)
    counts = tl.load(state + COUNTS + arms)
    alive = tl.load(state + ALIVE + arms)
    took = tl.where(last > 0, now - last, 0)

    held = hold > 1
    # The step in which a hold ends begins a trial: its own time is the held amount's.
    begins = (~held) & ((begun == 0) | (hold == 1))
    hold = tl.maximum(hold - 1, 0)
    tries = ~(held | begins)
    if begins:
        place = tl.zeros([], tl.int64)
        arm = tl.zeros([], tl.int64)
        rounds = tl.zeros([], tl.int64)
        shortest = tl.zeros([], tl.int64)
        sums = tl.zeros([MAX_AMOUNTS], tl.int64)
        counts = tl.zeros([MAX_AMOUNTS], tl.int64)
        alive = (arms < A).to(tl.int64)
        begun = tl.full([], 1, tl.int64)
    if tries:
        if took > 0:
            shortest = tl.where(shortest > 0, tl.minimum(shortest, took), took)
            counted = (place > 0) & (took <= OUTLIER * shortest)
            here = ((arms == arm) & counted).to(tl.int64)
            sums += here * took
            counts += here
        place += 1
        if place >= BLOCK_STEPS:
            place = tl.zeros([], tl.int64)
            later = tl.min(tl.where((alive > 0) & (arms > arm), arms, MAX_AMOUNTS), axis=0)
            if later < MAX_AMOUNTS:
                arm = later.to(tl.int64)
            else:
                rounds += 1
                mean = tl.where(alive > 0, sums // tl.maximum(counts, 1), NEVER)
                best = tl.min(mean, axis=0)
                margin = tl.maximum(FIRST_MARGIN >> rounds, LEAST_MARGIN)
                near = (alive > 0) & (tl.where(alive > 0, mean, 0) * 100 <= best * (100 + margin))
                fastest = tl.min(tl.where(mean == best, arms, MAX_AMOUNTS), axis=0)
                alive = near.to(tl.int64)
                arm = tl.min(tl.where(near, arms, MAX_AMOUNTS), axis=0).to(tl.int64)
                if (rounds >= ROUNDS) | (tl.sum(alive, axis=0) <= 1):
                    arm = fastest.to(tl.int64)
                    hold = (tl.full([], FIRST_HOLD, tl.int64)) << tl.minimum(holds, MAX_DOUBLINGS)
                    holds += 1

    # No warp may store what another has yet to load.
    tl.debug_barrier()
    tl.store(state + LAST, now)
    tl.store(state + PLACE, place)
    tl.store(state + ARM, arm)
    tl.store(state + ROUND, rounds)
    tl.store(state + HOLD, hold)
    tl.store(state + HOLDS, holds)
    tl.store(state + SHORTEST, shortest)
    tl.store(state + BEGUN, begun)
    tl.store(state + SUMS + arms, sums)
    tl.store(state + COUNTS + arms, counts)
    tl.store(state + ALIVE + arms, alive)
    tl.store(limit, tl.load(amounts + arm))


def launch_tune(state: Tensor, limit: Tensor, amounts: Tensor, now: Tensor | None) -> None:
    """Launch `tune_prefetch_kernel` on the current stream; arguments as checked by the op."""
    tune_prefetch_kernel[(1,)](
        state,
        limit,
        amounts,
        state if now is None else now,
        A=amounts.shape[0],
        NOW_GIVEN=now is not None,
        num_warps=1,
        num_stages=1,
    )
