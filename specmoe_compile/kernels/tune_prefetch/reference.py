"""What `tune_prefetch` computes, in plain Python; and the words of its state.

Shape letters: A amounts that are tried, at most 8.
"""

from __future__ import annotations

from torch import Tensor

LAST, PLACE, ARM, ROUND, HOLD, HOLDS, SHORTEST, BEGUN = range(8)
"""Words of the state: time of the last call in ns; steps of this block so far; place of the amount
in use; rounds so far; steps for which the chosen amount stays; choices so far; shortest step of the
trial in ns; whether a trial has begun."""
SUMS, COUNTS, ALIVE = 8, 16, 24
"""Where the words of the amounts begin: ns of their counted steps; number of these; 1 while an
amount is in the trial."""
MAX_AMOUNTS = 8
STATE_WORDS = 32

BLOCK_STEPS = 8
ROUNDS = 6
FIRST_HOLD = 1024
MAX_DOUBLINGS = 3
OUTLIER = 4
"""Times the shortest step of the trial beyond which a step does not count."""
FIRST_MARGIN, LEAST_MARGIN = 32, 3
"""Percent: after round r an amount stays within max(LEAST_MARGIN, FIRST_MARGIN / 2^r) of the
best."""


def tune_prefetch_reference(state: Tensor, limit: Tensor, amounts: Tensor, *, now_ns: int) -> None:
    """Change state and limit as `tune_prefetch` does; waits for the device."""
    words: list[int] = state.tolist()
    arms = amounts.shape[0]
    _advance(words, arms, now_ns)
    state.copy_(state.new_tensor(words))
    limit.fill_(int(amounts[words[ARM]]))


def _advance(words: list[int], arms: int, now_ns: int) -> None:
    took_ns = now_ns - words[LAST] if words[LAST] else 0
    words[LAST] = now_ns
    if words[HOLD] > 0:
        words[HOLD] -= 1
        if words[HOLD] > 0:
            return
        words[BEGUN] = 0
    if not words[BEGUN]:
        words[PLACE] = words[ARM] = words[ROUND] = words[SHORTEST] = 0
        words[BEGUN] = 1
        for arm in range(MAX_AMOUNTS):
            words[SUMS + arm] = words[COUNTS + arm] = 0
            words[ALIVE + arm] = int(arm < arms)
        return
    _count(words, took_ns)
    words[PLACE] += 1
    if words[PLACE] < BLOCK_STEPS:
        return
    words[PLACE] = 0
    later = [arm for arm in range(words[ARM] + 1, arms) if words[ALIVE + arm]]
    if later:
        words[ARM] = later[0]
        return
    _end_round(words, arms)


def _count(words: list[int], took_ns: int) -> None:
    if took_ns <= 0:
        return
    shortest = words[SHORTEST]
    words[SHORTEST] = min(shortest, took_ns) if shortest else took_ns
    if words[PLACE] > 0 and took_ns <= OUTLIER * words[SHORTEST]:
        words[SUMS + words[ARM]] += took_ns
        words[COUNTS + words[ARM]] += 1


def _end_round(words: list[int], arms: int) -> None:
    words[ROUND] += 1
    means = {
        arm: words[SUMS + arm] // max(1, words[COUNTS + arm])
        for arm in range(arms)
        if words[ALIVE + arm]
    }
    best = min(means.values())
    margin = max(LEAST_MARGIN, FIRST_MARGIN >> words[ROUND])
    for arm, mean in means.items():
        words[ALIVE + arm] = int(mean * 100 <= best * (100 + margin))
    words[ARM] = next(arm for arm in means if words[ALIVE + arm])
    if words[ROUND] < ROUNDS and sum(words[ALIVE : ALIVE + arms]) > 1:
        return
    words[ARM] = next(arm for arm, mean in means.items() if mean == best)
    words[HOLD] = FIRST_HOLD << min(words[HOLDS], MAX_DOUBLINGS)
    words[HOLDS] += 1
