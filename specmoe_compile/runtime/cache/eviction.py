"""Which expert of a layer is worth least: counts that forget, recency, and a choice among them.

An expert's score is a count of its uses that loses a part of itself with every step: after 2**k
steps 1/e of it is left. Counts with slow decay come half of the way from LRU to the best that is
possible; how slow is best depends on the model and the text, and after a change of topic recency
may be. So policy `adaptive` asks, of every expert that a step wants, which candidates would have
had it among their S best, adds up each one's misses over a sliding window, and follows the best.
One step in four is asked about: that takes longer than all the rest of a plan. No weights are kept
for that: a ranking of E numbers is the whole shadow.

Those S best may lack what a step wanted just now. So a missing expert that is worth less than all
that may leave for it is not kept under `adaptive`: it is computed from elsewhere, as far as there
are spare places for that. Counts then keep the S best that they know; recency keeps everything.

A prompt's routing is known before the first step of decoding. Under `adaptive` its last tokens are
counted as if each had been a step, without judging by them.

Integers only, so that the kernel `plan_cache` and the engine in C++ are equal to the bit.

Shape letters: E experts, S slots, D decays, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Policy = Literal["lru", "lfu", "adaptive"]
DEFAULT_POLICY: Policy = "adaptive"

DECAYS = (5, 7, 9)
"""k of each count: 32, 128 and 512 steps. A step is one plan that a routing asked for."""
LFU_CANDIDATE = 1
"""What policy `lfu` uses: 128 steps."""
RECENCY = len(DECAYS)
"""The candidate that ranks by the last use, as LRU does."""
CANDIDATES = len(DECAYS) + 1
UNIT = 1 << 14
"""What one use adds. With the slowest decay a score stays below 2**24."""
JUDGED_BITS = 6
"""A step is judged if none of these bits of its number is set: two of eight that follow each other,
so that one step in four is, whether each has a guess, which takes a number too, or none has."""
WINDOW = 6
"""Misses are forgotten as scores are: 2**6 judged steps, 256 in all."""
MISS = 1 << 16
STAY = 7
"""Another candidate is followed where its misses are fewer by more than one part in 2**7."""
PROMPT_TOKENS = 128
"""Tokens at the end of a prompt that are counted. Half as many gain less; twice as many gain a
little more, and take twice as long."""
SEEN_BITS = 29
INDEX_BITS = 9

Row = NDArray[np.int64]
Ids = NDArray[np.integer[Any]]


def followed(policy: Policy, candidate: int) -> str:
    """What decides in a layer, in words: "lru", "lfu" or "adaptive: counts over 128 steps".

    Args:
        policy: of the cache.
        candidate: that policy `adaptive` follows.
    """
    if policy != "adaptive":
        return policy
    how = "recency" if candidate == RECENCY else f"counts over {1 << DECAYS[candidate]} steps"
    return f"{policy}: {how}"


def check_policy(policy: str) -> None:
    """Raise `ValueError` for a policy that is none."""
    if policy not in get_args(Policy):
        names = ", ".join(get_args(Policy))
        raise ValueError(f"cache policy {policy!r} is not known: choose {names}")


class Scores:
    """Scores of one layer's experts.

    Attributes:
        table: [D + 1, E] int64: scores by decay, and the step of the last use.
        regret: [D + 2] int64: misses of each candidate over the window, and the one followed.
    """

    def __init__(self, experts: int) -> None:
        self.table: Row = np.zeros((CANDIDATES, experts), np.int64)
        self.regret: Row = np.zeros(CANDIDATES + 1, np.int64)
        self.regret[-1] = LFU_CANDIDATE

    @property
    def candidate(self) -> int:
        """The one that is followed."""
        return int(self.regret[-1])

    def note(self, experts: Sequence[int], now: int, slots: int, *, choose: bool) -> None:
        """Count one step's experts.

        Args:
            experts: distinct expert numbers that a routing asked for.
            now: the step, 1 or more.
            slots: S.
            choose: judge the candidates by it first, if its turn comes, and follow the best.
        """
        wanted = list(experts)
        if choose and not now & JUDGED_BITS:
            self._judge(wanted, slots)
        for row, decay in zip(self.table, DECAYS, strict=False):
            row -= row >> decay
            row[wanted] += UNIT
        self.table[RECENCY, wanted] = now

    def note_tokens(self, ids: Ids, now: int) -> None:
        """Count tokens as `note` would count a step of each, without judging.

        Args:
            ids: [T, K]; outside of 0..E-1 they are nobody.
            now: the step of the first token; the others have those behind it.
        """
        used = np.zeros((len(ids), self.table.shape[1]), np.int64)
        token, choice = np.nonzero((ids >= 0) & (ids < used.shape[1]))
        used[token, ids[token, choice]] = UNIT
        counts, decays = self.table[:RECENCY], np.array(DECAYS)[:, None]
        for added in used:
            counts -= counts >> decays
            counts += added
        seen = np.where(used > 0, np.arange(now, now + len(ids))[:, None], 0).max(0, initial=0)
        np.copyto(self.table[RECENCY], seen, where=seen > 0)

    def keys(self, candidate: int) -> Row:
        """What each expert is worth to a candidate, [E] int64, all different; least leaves first.

        The score, then the step of the last use, then the expert's number.
        """
        seen = (self.table[RECENCY] & ((1 << SEEN_BITS) - 1)) << INDEX_BITS
        keys: Row = seen | np.arange(seen.shape[0], dtype=np.int64)
        if candidate != RECENCY:
            keys |= self.table[candidate] << (SEEN_BITS + INDEX_BITS)
        return keys

    def _judge(self, wanted: list[int], slots: int) -> None:
        misses = self.regret[:CANDIDATES]
        experts = self.table.shape[1]
        for candidate in range(CANDIDATES):
            lacked = 0
            if slots < experts:
                keys = self.keys(candidate)
                least_kept = np.partition(keys, experts - slots)[experts - slots]
                lacked = int((keys[wanted] < least_kept).sum())
            misses[candidate] += lacked * MISS - (int(misses[candidate]) >> WINDOW)
        best = int(misses.argmin())
        if misses[best] + (misses[best] >> STAY) < misses[self.candidate]:
            self.regret[-1] = best
