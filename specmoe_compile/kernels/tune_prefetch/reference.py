"""What `tune_prefetch` computes, in plain Python; and the words of its state.

Shape letters: A amounts that are tried, at most 8.
"""

from __future__ import annotations

from torch import Tensor

LAST, PLACE, ARM, ROUND, HOLD, HOLDS, SHORTEST, TURN = range(8)
"""Words of the state: time of the last call in ns; steps of this block so far; place of the amount
in use; rounds so far; steps for which it stays; how often it was to stay, 0 before the first call;
shortest step of the trial in ns; blocks of this round so far."""
SUMS, COUNTS, ALIVE = 8, 16, 24
"""Where the words of the amounts begin: ns of their counted steps; number of these; 1 while an
amount is in the trial."""
MAX_AMOUNTS = 8
STATE_WORDS = 32

WARM_STEPS = 48
"""Steps with the first amount before the first trial: an empty cache would favour the amounts that
are tried last."""
BLOCK_STEPS = 2
"""Steps in a row with one amount. Longer blocks would give each amount other parts of the text, and
what the amount before has left in the cache; with one step nobody pays for what he pushes out."""
ROUNDS = 96
"""At most. The last rounds cost little: what is left by then is about as fast as the best."""
FIRST_HOLD = 1024
MAX_DOUBLINGS = 3
OUTLIER = 4
"""Times the shortest step of the trial beyond which a step does not count."""
FIRST_MARGIN, MIN_MARGIN = 160, 1
"""Percent: after round r an amount stays within max(MIN_MARGIN, FIRST_MARGIN / r) of the best.
With a cache the steps of one amount differ by a third; half of the margin and a quarter of the
rounds missed the best amount in 15 of 288 trials, these in 1, simulated
(docs/results/log/full_size.md)."""


def tune_prefetch_reference(state: Tensor, limit: Tensor, amounts: Tensor, *, now_ns: int) -> None:
    """Change state and limit as `tune_prefetch` does; waits for the device."""
    words: list[int] = state.tolist()
    arms = amounts.shape[0]
    advance(words, arms, now_ns)
    state.copy_(state.new_tensor(words))
    limit.fill_(int(amounts[words[ARM]]))


def advance(words: list[int], arms: int, now_ns: int) -> None:
    """Take in that a step ended at `now_ns` and choose for the next, among `arms` amounts."""
    took_ns = now_ns - words[LAST] if words[LAST] else 0
    words[LAST] = now_ns
    if not words[HOLDS]:
        words[HOLDS], words[HOLD] = 1, WARM_STEPS
    elif words[HOLD] > 1:
        words[HOLD] -= 1
    elif words[HOLD] == 1:
        # The last step's own time is that of the amount that stayed.
        words[HOLD] = words[PLACE] = words[ARM] = words[ROUND] = 0
        words[SHORTEST] = words[TURN] = 0
        for arm in range(MAX_AMOUNTS):
            words[SUMS + arm] = words[COUNTS + arm] = 0
            words[ALIVE + arm] = int(arm < arms)
    else:
        _count(words, took_ns)
        words[PLACE] += 1
        if words[PLACE] == BLOCK_STEPS:
            _next_block(words, arms)


def _count(words: list[int], took_ns: int) -> None:
    if took_ns <= 0:
        return
    shortest = words[SHORTEST]
    words[SHORTEST] = min(shortest, took_ns) if shortest else took_ns
    if took_ns <= OUTLIER * words[SHORTEST]:
        words[SUMS + words[ARM]] += took_ns
        words[COUNTS + words[ARM]] += 1


def _next_block(words: list[int], arms: int) -> None:
    words[PLACE] = 0
    words[TURN] += 1
    alive = [arm for arm in range(arms) if words[ALIVE + arm]]
    if words[TURN] == len(alive):
        words[TURN] = 0
        words[ROUND] += 1
        means = {arm: words[SUMS + arm] // max(1, words[COUNTS + arm]) for arm in alive}
        best = min(means.values())
        margin = max(MIN_MARGIN, FIRST_MARGIN // words[ROUND])
        alive = [arm for arm in alive if means[arm] * 100 <= best * (100 + margin)]
        for arm in range(arms):
            words[ALIVE + arm] = int(arm in alive)
        if words[ROUND] == ROUNDS or len(alive) == 1:
            words[ARM] = next(arm for arm in alive if means[arm] == best)
            words[HOLD] = FIRST_HOLD << min(words[HOLDS] - 1, MAX_DOUBLINGS)
            words[HOLDS] += 1
            return
    # Each round begins with another amount.
    words[ARM] = alive[(words[TURN] + words[ROUND]) % len(alive)]
