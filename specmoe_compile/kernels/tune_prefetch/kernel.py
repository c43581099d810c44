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
TURN = tl.constexpr(words.TURN)
SUMS = tl.constexpr(words.SUMS)
COUNTS = tl.constexpr(words.COUNTS)
ALIVE = tl.constexpr(words.ALIVE)
MAX_AMOUNTS = tl.constexpr(words.MAX_AMOUNTS)
WARM_STEPS = tl.constexpr(words.WARM_STEPS)
BLOCK_STEPS = tl.constexpr(words.BLOCK_STEPS)
ROUNDS = tl.constexpr(words.ROUNDS)
FIRST_HOLD = tl.constexpr(words.FIRST_HOLD)
MAX_DOUBLINGS = tl.constexpr(words.MAX_DOUBLINGS)
OUTLIER = tl.constexpr(words.OUTLIER)
FIRST_MARGIN = tl.constexpr(words.FIRST_MARGIN)
MIN_MARGIN = tl.constexpr(words.MIN_MARGIN)
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
    turn = tl.load(state + TURN)
    sums = tl.load(state + SUMS + arms)
    counts = tl.load(state + COUNTS + arms)
    alive = tl.load(state + ALIVE + arms)
    took = tl.where(last > 0, now - last, 0)

    if holds == 0:
        holds += 1
        hold += WARM_STEPS
    elif hold > 1:
        hold -= 1
    elif hold == 1:
        # The last step's own time is that of the amount that stayed.
        hold = tl.zeros([], tl.int64)
        place = tl.zeros([], tl.int64)
        arm = tl.zeros([], tl.int64)
        rounds = tl.zeros([], tl.int64)
        shortest = tl.zeros([], tl.int64)
        turn = tl.zeros([], tl.int64)
        sums = tl.zeros([MAX_AMOUNTS], tl.int64)
        counts = tl.zeros([MAX_AMOUNTS], tl.int64)
        alive = (arms < A).to(tl.int64)
    else:
        if took > 0:
            shortest = tl.where(shortest > 0, tl.minimum(shortest, took), took)
            counted = (arms == arm) & (took <= shortest * OUTLIER)
            sums += tl.where(counted, took, 0)
            counts += counted.to(tl.int64)
        place += 1
        if place == BLOCK_STEPS:
            place = tl.zeros([], tl.int64)
            turn += 1
            ends = tl.zeros([], tl.int64)
            mean = tl.where(alive > 0, sums // tl.maximum(counts, 1), 0)
            best = tl.min(tl.where(alive > 0, mean, NEVER), axis=0)
            if turn == tl.sum(alive, axis=0):
                turn = tl.zeros([], tl.int64)
                rounds += 1
                margin = tl.full([], FIRST_MARGIN, tl.int64) // rounds
                margin = tl.maximum(margin, MIN_MARGIN)
                alive = ((alive > 0) & (mean * 100 <= best * (100 + margin))).to(tl.int64)
                ends = ((rounds == ROUNDS) | (tl.sum(alive, axis=0) == 1)).to(tl.int64)
            if ends != 0:
                fastest = (alive > 0) & (mean == best)
                arm = tl.min(tl.where(fastest, arms, MAX_AMOUNTS), axis=0).to(tl.int64)
                hold += (tl.full([], FIRST_HOLD, tl.int64)) << tl.minimum(holds - 1, MAX_DOUBLINGS)
                holds += 1
            else:
                # Each round begins with another amount.
                rank = (turn + rounds) % tl.sum(alive, axis=0)
                chosen = (alive > 0) & (tl.cumsum(alive, axis=0) == rank + 1)
                arm = tl.min(tl.where(chosen, arms, MAX_AMOUNTS), axis=0).to(tl.int64)

    # No warp may store what another has yet to load.
    tl.debug_barrier()
    tl.store(state + LAST, now)
    tl.store(state + PLACE, place)
    tl.store(state + ARM, arm)
    tl.store(state + ROUND, rounds)
    tl.store(state + HOLD, hold)
    tl.store(state + HOLDS, holds)
    tl.store(state + SHORTEST, shortest)
    tl.store(state + TURN, turn)
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
