"""Triton functions of `plan_cache`: what experts are worth, as in `runtime.cache.eviction`.

Everything is loaded in front of the first store, so that one wait for memory follows another only
where an address depends on a value. Scores of three decays are three values, not a loop.

Shape letters: C = T * K choices, E experts, S slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specmoe_compile.runtime.cache import eviction

# Keys hold an expert or a slot, both below 512, in their lowest bits. Above a slot there is room
# for 2**53 plans.
INDEX_BITS = tl.constexpr(eviction.INDEX_BITS)
LAST_KEY = tl.constexpr(2**63 - 1)
SEEN_MASK = tl.constexpr(2**eviction.SEEN_BITS - 1)
SCORE_SHIFT = tl.constexpr(eviction.SEEN_BITS + eviction.INDEX_BITS)
CANDIDATES = tl.constexpr(eviction.CANDIDATES)
RECENCY = tl.constexpr(eviction.RECENCY)
LFU_CANDIDATE = tl.constexpr(eviction.LFU_CANDIDATE)
UNIT = tl.constexpr(eviction.UNIT)
MISS = tl.constexpr(eviction.MISS)
WINDOW = tl.constexpr(eviction.WINDOW)
JUDGED_BITS = tl.constexpr(eviction.JUDGED_BITS)
STAY = tl.constexpr(eviction.STAY)
# Decays are evenly spaced, so that a candidate's is computed from its number.
FIRST_DECAY = tl.constexpr(eviction.DECAYS[0])
DECAY_STEP = tl.constexpr(eviction.DECAYS[1] - eviction.DECAYS[0])
# Numbers of two candidates side by side in an int32, whose sum over a warp is one instruction: none
# exceeds 512.
FIELD_BITS = tl.constexpr(16)
FIELD_MASK = tl.constexpr(2**16 - 1)
UPPER = tl.constexpr(2**16)

assert eviction.CANDIDATES == 4, "three decays and recency have a value each below"


@triton.jit
def load_scores(scores, experts, mask, E: tl.constexpr):
    """Scores by decay, and the step of the last use, of some experts; each int64."""
    return (
        tl.load(scores + experts, mask=mask, other=0),
        tl.load(scores + E + experts, mask=mask, other=0),
        tl.load(scores + 2 * E + experts, mask=mask, other=0),
        tl.load(scores + RECENCY * E + experts, mask=mask, other=0),
    )


@triton.jit
def packed_worth(score, seen, expert):
    """`Scores.keys`: score, step of the last use, number of the expert; int64."""
    return (score << SCORE_SHIFT) | ((seen & SEEN_MASK) << INDEX_BITS) | expert


@triton.jit
def worth_of(fast, middle, slow, seen, expert, candidate, hit, now, SPECULATIVE: tl.constexpr):
    """What experts are worth to a candidate after this step, int64.

    The step's uses are added here and not read back: other lanes store them.
    """
    score = tl.where(candidate == 0, fast, tl.where(candidate == 1, middle, slow))
    score = tl.where(candidate == RECENCY, 0, score)
    if not SPECULATIVE:
        decay = FIRST_DECAY + DECAY_STEP * candidate
        score = score - (score >> decay) + tl.where(hit & (candidate != RECENCY), UNIT, 0)
        seen = tl.where(hit, now, seen)
    return packed_worth(score, seen, expert)


@triton.jit
def are_chosen(ids, experts, CHOICES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Whether each expert is among the choices, bool [BLOCK_E]."""
    found = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, CHOICES, CHUNK):
        choices = start + tl.arange(0, CHUNK)
        chosen = tl.load(ids + choices, mask=choices < CHOICES, other=-1)
        chosen = tl.where((chosen >= 0) & (chosen < BLOCK_E), chosen, -1).to(tl.int32)
        part = tl.max((chosen[:, None] == experts[None, :]).to(tl.int32), axis=0)
        found = tl.maximum(found, part)
    return found > 0


@triton.jit
def fields_from(above, S: tl.constexpr):
    """1 in each field of an int32 that is S or more."""
    first = tl.where((above & FIELD_MASK) >= S, 1, 0)
    return first + tl.where((above >> FIELD_BITS) >= S, UPPER, 0)


@triton.jit
def count_lacked(
    ids,
    scores,
    fast,
    middle,
    slow,
    seen,
    CHOICES: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """How many of a step's experts each candidate would have lacked, two in fields of an int32.

    An expert is lacked if S others are worth more.
    """
    experts = tl.arange(0, BLOCK_E)
    real = experts < E
    every = tl.arange(0, BLOCK_C)
    each = tl.load(ids + every, mask=every < CHOICES, other=-1)
    none = tl.zeros([BLOCK_E], tl.int64)
    by_fast = tl.where(real, packed_worth(fast, seen, experts), -1)
    by_middle = tl.where(real, packed_worth(middle, seen, experts), -1)
    by_slow = tl.where(real, packed_worth(slow, seen, experts), -1)
    by_use = tl.where(real, packed_worth(none, seen, experts), -1)
    lacked_one = tl.zeros([], tl.int32)
    lacked_other = tl.zeros([], tl.int32)
    for start in range(0, CHOICES, CHUNK):
        choices = start + tl.arange(0, CHUNK)
        chosen = tl.load(ids + choices, mask=choices < CHOICES, other=-1)
        again = (chosen[:, None] == each[None, :]) & (every[None, :] < choices[:, None])
        wanted = (chosen >= 0) & (chosen < E) & (tl.max(again.to(tl.int32), axis=1) == 0)
        expert = tl.where(wanted, chosen, 0).to(tl.int32)
        its_fast, its_middle, its_slow, its_seen = load_scores(scores, expert, wanted, E)
        its_none = tl.zeros([CHUNK], tl.int64)
        one = by_fast[None, :] > packed_worth(its_fast, its_seen, expert)[:, None]
        two = by_middle[None, :] > packed_worth(its_middle, its_seen, expert)[:, None]
        above = tl.sum(tl.where(one, 1, 0) + tl.where(two, UPPER, 0), axis=1)
        lacked_one += tl.sum(tl.where(wanted, fields_from(above, S), 0), axis=0)
        one = by_slow[None, :] > packed_worth(its_slow, its_seen, expert)[:, None]
        two = by_use[None, :] > packed_worth(its_none, its_seen, expert)[:, None]
        above = tl.sum(tl.where(one, 1, 0) + tl.where(two, UPPER, 0), axis=1)
        lacked_other += tl.sum(tl.where(wanted, fields_from(above, S), 0), axis=0)
    return lacked_one, lacked_other


@triton.jit
def judge(misses, candidate, lacked_one, lacked_other):
    """`Scores._judge`: add each candidate's misses, and choose the one to follow.

    Args:
        misses: [CANDIDATES] int64, over the window; candidate: the one followed, int64.
        lacked_one, lacked_other: fields of this step, see `count_lacked`.

    Returns:
        Both as they are from now on.
    """
    numbers = tl.arange(0, CANDIDATES)
    lacked = tl.where(numbers < 2, lacked_one, lacked_other)
    added = (lacked >> (numbers % 2 * FIELD_BITS)) & FIELD_MASK
    misses = misses + added.to(tl.int64) * MISS - (misses >> WINDOW)
    least = tl.min(misses, axis=0)
    best = tl.min(tl.where(misses == least, numbers, CANDIDATES), axis=0).to(tl.int64)
    followed = tl.sum(tl.where(numbers == candidate, misses, 0), axis=0)
    return misses, tl.where(least + (least >> STAY) < followed, best, candidate)


@triton.jit
def count_step(fast, middle, slow, used):
    """`Scores.note`: counts after a step, each int64: all decay, and its experts are counted."""
    added = tl.where(used, UNIT, 0)
    SECOND: tl.constexpr = FIRST_DECAY + DECAY_STEP
    THIRD: tl.constexpr = SECOND + DECAY_STEP
    fast = fast - (fast >> FIRST_DECAY) + added
    middle = middle - (middle >> SECOND) + added
    return fast, middle, slow - (slow >> THIRD) + added


@triton.jit
def store_scores(scores, experts, fast, middle, slow, used, now, E: tl.constexpr):
    """Count a step and write it down."""
    real = experts < E
    fast, middle, slow = count_step(fast, middle, slow, used)
    tl.store(scores + experts, fast, mask=real)
    tl.store(scores + E + experts, middle, mask=real)
    tl.store(scores + 2 * E + experts, slow, mask=real)
    seen = tl.zeros_like(fast) + now
    tl.store(scores + RECENCY * E + experts, seen, mask=real & used)
