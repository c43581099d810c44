"""Rules for the cache that were tried, all streams at once, in float64.

Shape letters: R rows (a layer of a text with a number of slots), T tokens, K top-k, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.simulation.fast_replay import best_hits
from specmoe_compile.runtime.cache.eviction import JUDGED_BITS, WINDOW

EXPERTS = 32
SLOTS = (6, 8, 12, 16, 24)
TIE = 1e-12
"""What the step of the last use weighs among equal counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What decides who leaves.

    Attributes:
        candidates: each the weights of counts by decay: {7: 1.0, 9: 0.5} is the rate over 128 steps
            and half of that over 512. None is recency.
        window: misses of candidates are forgotten over 2**window judged steps.
        judged: a step is judged if none of these bits of its number is set.
        stay: another is followed where its misses are fewer by one part in 2**stay.
        spare: so many that are missing and worth less than all that is held are not kept.
        temporary: what is missing and worth less than all that is held leaves first.
        likely: counts are of the probabilities of all experts, not of those that are chosen.
    """

    name: str
    candidates: tuple[dict[float, float] | None, ...]
    window: int = WINDOW
    judged: int = JUDGED_BITS
    stay: int = 7
    spare: int = 0
    temporary: bool = False
    likely: bool = False


NOW: tuple[dict[float, float] | None, ...] = ({7: 1.0}, {5: 1.0}, {9: 1.0}, None)
LRU = Rule(name="LRU", candidates=(None,))
RULES = (
    Rule(name="adaptive, all kept", candidates=NOW),
    Rule(name="window of 64 steps", candidates=NOW, window=4),
    Rule(name="window of 1024 steps", candidates=NOW, window=8),
    Rule(name="every step judged", candidates=NOW, window=8, judged=0),
    Rule(name="less hysteresis: 1 in 4096", candidates=NOW, stay=12),
    Rule(name="more hysteresis: 1 in 16", candidates=NOW, stay=4),
    Rule(name="decays of 64, 256, 1024", candidates=({8: 1.0}, {6: 1.0}, {10: 1.0}, None)),
    Rule(
        name="six decays, 32 to 1024",
        candidates=({7: 1.0}, *({float(k): 1.0} for k in (5, 6, 8, 9, 10)), None),
    ),
    Rule(name="one count, 128 steps", candidates=({7: 1.0},)),
    Rule(name="one count, 256 steps", candidates=({8: 1.0},)),
    Rule(name="rates of 128 and 512 added", candidates=({7: 1.0, 9: 1.0},)),
    Rule(name="rates of 32, 128, 512 added", candidates=({5: 1.0, 7: 1.0, 9: 1.0},)),
    Rule(name="the same, 1 : 2 : 4", candidates=({5: 0.25, 7: 0.5, 9: 1.0},)),
    Rule(name="16, 128, 1024 as 1 : 4 : 8", candidates=({4: 0.125, 7: 0.5, 10: 1.0},)),
    Rule(
        name="sums among the candidates",
        candidates=({5: 0.25, 7: 0.5, 9: 1.0}, {5: 1.0}, {7: 1.0, 9: 1.0}, None),
    ),
    Rule(name="a temporary slot", candidates=NOW, temporary=True),
    Rule(name="bypass, one spare place", candidates=NOW, spare=1),
    Rule(name="bypass, two spare places", candidates=NOW, spare=2),
    Rule(name="bypass, four: adaptive as it is", candidates=NOW, spare=4),
)
LIKELY_SLOTS = (4, 8, 16, 24)
LIKELY_RULES = tuple(
    rule
    for spare, kept in ((0, ", all kept"), (4, ""))
    for rule in (
        Rule(name=f"adaptive{kept}", candidates=NOW, spare=spare),
        *(
            Rule(
                name=f"{what}, {keeps:g} a token{kept}",
                candidates=({-math.log2(1 - keeps): 1.0},),
                spare=spare,
                likely=what == "probabilities",
            )
            for what in ("choices", "probabilities")
            for keeps in (0.95, 0.99)
        ),
    )
)


class _Cache:
    """All rows' slots and counts under one rule."""

    def __init__(self, rule: Rule, slots: NDArray[np.int64]) -> None:
        rows = len(slots)
        decays = sorted({k for weights in rule.candidates if weights for k in weights})
        self.rule, self.slots = rule, slots
        self.rows = np.arange(rows)[:, None]
        self.counts = {k: np.zeros((rows, EXPERTS)) for k in decays}
        self.seen = np.tile(np.arange(EXPERTS) * 1e-3, (rows, 1))
        self.held = np.zeros((rows, EXPERTS), bool)
        self.leaves_first = np.zeros((rows, EXPERTS), bool)
        self.misses = np.zeros((rows, len(rule.candidates)))
        self.followed = np.zeros(rows, np.int64)
        self.hits = np.zeros(rows, np.int64)

    def keys(self, candidate: int) -> NDArray[np.float64]:
        """What each expert is worth to a candidate, [R, E]."""
        weights = self.rule.candidates[candidate]
        if weights is None:
            return self.seen
        return sum((w * self.counts[k] for k, w in weights.items()), TIE * self.seen)

    def step(
        self, wanted: NDArray[np.int64], now: int, likely: NDArray[np.float32] | None = None
    ) -> None:
        """One token of every row: [R, K], and what is counted in place of it, [R, E]."""
        if not now & self.rule.judged and len(self.rule.candidates) > 1:
            self._judge(wanted)
        for decay, counts in self.counts.items():
            counts *= 1 - 0.5**decay
            if likely is None:
                counts[self.rows, wanted] += 0.5**decay
            else:
                counts += 0.5**decay * likely
        self.seen[self.rows, wanted] = now + wanted * 1e-3
        self.hits += self.held[self.rows, wanted].sum(1)
        if len(self.rule.candidates) == 1:
            self._fill(wanted, self.keys(0))
            return
        every = np.stack([self.keys(c) for c in range(len(self.rule.candidates))])
        self._fill(wanted, every[self.followed, self.rows[:, 0]])

    def _judge(self, wanted: NDArray[np.int64]) -> None:
        rows = self.rows[:, 0]
        self.misses *= 1 - 0.5**self.rule.window
        for candidate in range(len(self.rule.candidates)):
            keys = self.keys(candidate)
            least_kept = np.sort(keys, axis=1)[rows, EXPERTS - self.slots]
            lacked = keys[self.rows, wanted] < least_kept[:, None]
            self.misses[:, candidate] += lacked.sum(1)
        best = self.misses.argmin(1)
        margin = 1 + 0.5**self.rule.stay
        better = self.misses[rows, best] * margin < self.misses[rows, self.followed]
        self.followed = np.where(better, best, self.followed)

    def _fill(self, wanted: NDArray[np.int64], keys: NDArray[np.float64]) -> None:
        rows = self.rows[:, 0]
        asked = np.zeros_like(self.held)
        asked[self.rows, wanted] = True
        passed = np.zeros(len(rows), np.int64)
        temporary = np.zeros_like(self.held)
        for expert in wanted.T:
            missing = ~self.held[rows, expert]
            full = missing & (self.held.sum(1) >= self.slots)
            worth = np.where(self.held & ~asked, keys, np.inf)
            weakest = full & (keys[rows, expert] < worth.min(1))
            leaves = np.where(self.leaves_first, worth - 1e9, worth).argmin(1)
            bypassed = weakest & (passed < self.rule.spare)
            passed += bypassed
            keep = missing & ~bypassed
            out = full & keep
            self.held[rows[out], leaves[out]] = False
            self.held[rows[keep], expert[keep]] = True
            temporary[rows[weakest], expert[weakest]] = self.rule.temporary
        self.leaves_first = (self.leaves_first & ~asked | temporary) & self.held


def hit_counts(
    streams: NDArray[np.int64],
    slots: NDArray[np.int64],
    rule: Rule,
    likely: NDArray[np.float32] | None = None,
) -> Any:
    """Hits of each row, [R].

    Args:
        streams: [R, T, K].
        slots: [R].
        rule: who leaves.
        likely: probabilities, [R', T, E], of the first R' rows and of every R' that follow.
    """
    cache = _Cache(rule, slots)
    for now in range(streams.shape[1]):
        counted = None
        if likely is not None:
            counted = np.tile(likely[:, now], (len(slots) // len(likely), 1))
        cache.step(streams[:, now], now + 1, counted)
    return cache.hits


def try_probabilities(
    recorded: Mapping[str, Tensor], logits: Mapping[str, Tensor], pool: Pool
) -> list[dict[str, Any]]:
    """Percent of hits of rules that count choices or probabilities, by slots.

    Args:
        recorded: experts by text, [L, T, K], of equal length.
        logits: of the routers, [L, T, E].
        pool: workers.
    """
    parts = torch.cat(list(recorded.values())).numpy().astype(np.int64)
    likely = torch.cat(list(logits.values())).softmax(-1).numpy()
    streams = np.tile(parts, (len(LIKELY_SLOTS), 1, 1))
    slots = np.repeat(np.array(LIKELY_SLOTS), len(parts))
    jobs = [(streams, slots, rule, likely if rule.likely else None) for rule in LIKELY_RULES]
    counts = np.array(pool.starmap(hit_counts, jobs, 1))
    hits = counts.reshape(len(jobs), len(LIKELY_SLOTS), len(recorded), -1).sum(-1)
    rates = 100 * hits / (parts.size / len(recorded))
    rows = []
    for rule, own in zip(LIKELY_RULES, rates, strict=True):
        adaptive = next(i for i, other in enumerate(LIKELY_RULES) if other.spare == rule.spare)
        means = map(float, own.mean(1))
        rows.append(
            {
                "rule": rule.name,
                "hits": dict(zip(map(str, LIKELY_SLOTS), means, strict=True)),
                "least_against_adaptive": float((own - rates[adaptive]).min()),
                "most_against_adaptive": float((own - rates[adaptive]).max()),
            }
        )
    return rows


def try_rules(recorded: Mapping[str, Tensor], pool: Pool) -> list[dict[str, Any]]:
    """How far each rule goes from LRU to Belady; [L, T, K] by text, of equal length."""
    length = min(stream.shape[1] for stream in recorded.values())
    parts = [stream[:, :length].numpy().astype(np.int64) for stream in recorded.values()]
    layers = parts[0].shape[0]
    streams = np.concatenate([part for _ in SLOTS for part in parts])
    slots = np.repeat(np.array(SLOTS), len(parts) * layers)
    best = np.array(
        [
            best_hits(stream.tolist(), EXPERTS, int(count), may_bypass=False)
            for stream, count in zip(streams, slots, strict=True)
        ]
    )
    counts = pool.starmap(hit_counts, [(streams, slots, rule) for rule in (LRU, *RULES)], 1)

    def by_text(counts: Any) -> Any:
        return counts.reshape(len(SLOTS) * len(parts), layers).sum(1)

    lru, belady = by_text(counts[0]), by_text(best)
    found = []
    for rule, hits in zip(RULES, counts[1:], strict=True):
        gained = by_text(hits) - lru
        ways = (gained / (belady - lru)).reshape(len(SLOTS), -1).mean(1)
        found.append(
            {
                "rule": rule.name,
                "mean_of_ways": float(ways.mean()),
                "by_slots": dict(zip(map(str, SLOTS), map(float, ways), strict=True)),
                "worst_against_lru": float(100 * gained.min() / streams[0].size / layers),
            }
        )
    return found
