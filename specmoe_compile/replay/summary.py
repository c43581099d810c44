"""What replays of a trace say: hit rates beside Belady's bound, times per token, and what pays.

Shape letters: E experts, K top-k, S slots per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median
from typing import Any

from specmoe_compile.replay.engine import ComputeTimes, RankGroup, Replay, ReplaySetting, replay
from specmoe_compile.replay.link import Link
from specmoe_compile.replay.steps import ReplaySteps
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.cache.slot_table import belady_hits
from specmoe_compile.runtime.store.slice import own_experts

PAYS = 0.05
"""A larger cache pays if it takes more than this share off the time per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One replay in numbers; rates, times and bytes are those of decoding, after the warm-up.

    `total_hits` and `total_misses` count all steps, prefill and warm-up too. `belady_hit_rate` is
    the best that any replacement without prefetch can have; None without a cache, with several
    ranks, or where a step wants more experts than there are slots. With ranks, counts and bytes are
    of all.
    """

    expert_cache: str
    cache_bytes: int
    slots: int
    cache_policy: str
    predictor: str
    hit_rate: float
    belady_hit_rate: float | None
    total_hits: int
    total_misses: int
    recall: float | None
    tpot_ms: float
    tpot_mean_ms: float
    stall_ms_per_token: float
    demand_bytes_per_token: float
    speculative_bytes_per_token: float
    decode_steps: int

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def counted_steps(trace: RoutingTrace, warmup_steps: int) -> list[int]:
    """Return the decode steps behind the warm-up; raises `ValueError` if there are none."""
    decode = trace.decode_steps()
    if len(decode) <= warmup_steps:
        raise ValueError(
            f"The trace has {len(decode)} decode steps, and {warmup_steps} of them are warm-up:"
            " record more tokens, or give a smaller --warmup."
        )
    return decode[warmup_steps:]


class Sweep:
    """Replays of one trace on one machine, summed up.

    Attributes:
        steps: of the trace.
        counted: steps whose rates and times count.
    """

    def __init__(
        self,
        steps: ReplaySteps,
        link: Link,
        compute: ComputeTimes,
        *,
        warmup_steps: int = 0,
        ranks: RankGroup | None = None,
    ) -> None:
        """Set the machine.

        Args:
            steps: of the trace.
            link, compute: how long things take.
            warmup_steps: decode steps that are replayed and not counted.
            ranks: that share the experts; caches are of each.

        Raises:
            ValueError: no decode step is left to count.
        """
        self.steps = steps
        self._link = link
        self._compute = compute
        self._ranks = RankGroup() if ranks is None else ranks
        self.counted = counted_steps(steps.trace, warmup_steps)
        self._bound = cache(self._belady_hit_rate)

    def run(
        self, setting: ReplaySetting, *, name: str, on_step: Callable[[], object] | None = None
    ) -> Summary:
        """Replay once.

        Args:
            setting: cache and predictions.
            name: the cache size as it was given.
            on_step: called after each step.

        Raises:
            ValueError: the cache does not hold one token's experts.
        """
        done = replay(
            self.steps, setting, self._link, self._compute, ranks=self._ranks, on_step=on_step
        )
        return self._summary(done, name)

    def sufficient_bytes(
        self,
        setting: ReplaySetting,
        *,
        on_step: Callable[[], object] | None = None,
    ) -> tuple[int, int]:
        """Find the cache beyond which more does not pay, by bisection over slots.

        That is the smallest whose time per token is at most `PAYS` above that of a cache that holds
        everything.

        Returns:
            Its slots per layer, and its bytes.
        """
        trace = self.steps.trace
        slot_bytes = sum(trace.record_bytes)

        def tpot_ms(slots: int) -> float:
            one = ReplaySetting(
                cache_bytes=slots * slot_bytes,
                cache_policy=setting.cache_policy,
                predictor=setting.predictor,
                speculation=setting.speculation,
            )
            return self.run(one, name="", on_step=on_step).tpot_mean_ms

        own = own_experts(max(trace.num_experts), self._ranks.size)
        too_small, enough = min(trace.top_k, own) - 1, own
        max_ms = (1 + PAYS) * tpot_ms(enough)
        while enough - too_small > 1:
            middle = (too_small + enough) // 2
            if tpot_ms(middle) <= max_ms:
                enough = middle
            else:
                too_small = middle
        return enough, enough * slot_bytes

    def _summary(self, done: Replay, name: str) -> Summary:
        costs = [done.steps[step] for step in self.counted]
        tokens = sum(self.steps.tokens[step] for step in self.counted)
        hits, misses = sum(c.hits for c in costs), sum(c.misses for c in costs)
        total = done.total
        per_token_ms = [c.ms for c in costs]
        is_one = self._ranks.size == 1
        return Summary(
            expert_cache=name,
            cache_bytes=done.setting.cache_bytes,
            slots=max(done.slots, default=0),
            cache_policy=done.setting.cache_policy if done.slots else "-",
            predictor=done.setting.predictor,
            hit_rate=hits / max(1, hits + misses),
            belady_hit_rate=self._bound(done.slots) if is_one and done.slots else None,
            total_hits=total.hits,
            total_misses=total.misses,
            recall=total.recall if total.needed else None,
            tpot_ms=median(per_token_ms),
            tpot_mean_ms=fmean(per_token_ms),
            stall_ms_per_token=sum(c.stall_ms for c in costs) / len(costs),
            demand_bytes_per_token=sum(c.demand_bytes for c in costs) / tokens,
            speculative_bytes_per_token=sum(c.speculative_bytes for c in costs) / tokens,
            decode_steps=len(costs),
        )

    def _belady_hit_rate(self, slots: tuple[int, ...]) -> float | None:
        """Best hit rate of the counted steps, from a cache that may hold anything before them.

        None where a step needs more experts than there are slots.
        """
        hits = requests = 0
        for layer, count in enumerate(slots):
            wanted = self.steps.requests(layer, self.counted)
            if max(map(len, wanted)) > count:
                return None
            hits += belady_hits([_soonest(wanted, count), *wanted], count, may_bypass=True)
            requests += sum(map(len, wanted))
        return hits / requests


def _soonest(requests: Sequence[Sequence[int]], count: int) -> list[int]:
    """Return the experts that are needed first: the best that a cache can hold before."""
    return list(dict.fromkeys(e for experts in requests for e in experts))[:count]
