"""Runs a trace through the runtime on simulated time.

Cache, double buffers, residency, speculator and its judgement of what pays are the runtime's own
classes, called in the order in which a rewritten graph calls them. What is simulated is the link
(`SimulatedLink`) and how long computing takes (`ComputeTimes`); no byte is moved and no expert is
computed.

Shape letters: T tokens, E experts, L MoE layers, K top-k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from specmoe_compile.options import MAX_DECODE_TOKENS, SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.replay.link import Link, SimulatedLink
from specmoe_compile.replay.predictors import PREDICTORS, Predictor
from specmoe_compile.replay.steps import ReplaySteps, Rows
from specmoe_compile.replay.timed import (
    TimedResidency,
    TimedRunner,
    allocate_nothing,
    sizes_only_store,
)
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.cpu.fast_tier import FastTier
from specmoe_compile.runtime.cpu.speculator import Speculator
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.slice import SliceStore

NO_TICKET = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeTimes:
    """How long a step computes, apart from all waiting; milliseconds."""

    layer_ms: float
    """everything of a layer but its experts: attention, norms, router."""
    expert_ms: float
    """one expert, whatever the number of its tokens."""
    fetched_ms: float = 0.0
    """what an expert takes longer when it was fetched for the step: its weights are in no processor
    cache, a thread had to be woken, and readers want the processor too."""
    prediction_ms: float = 0.0
    """the host's time for one prediction of a layer."""
    step_ms: float = 0.0
    """what a step computes outside of the MoE layers, after the last one."""

    def __post_init__(self) -> None:
        for name in ("layer_ms", "expert_ms", "fetched_ms", "prediction_ms", "step_ms"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be 0 or more milliseconds.")

    @classmethod
    def split(
        cls,
        compute_ms: float,
        *,
        layers: int,
        top_k: int,
        expert_share: float,
        fetched_ms: float = 0.0,
        prediction_ms: float = 0.0,
    ) -> ComputeTimes:
        """Spread a decode step's computing over its layers and experts.

        Args:
            compute_ms: of a step of one token with everything in the fast tier.
            layers: L.
            top_k: K.
            expert_share: part of it that the experts take, 0..1.
            fetched_ms: what an expert takes longer when it was fetched for the step.
            prediction_ms: the host's time for one prediction of a layer.
        """
        if not 0 <= expert_share <= 1:
            raise ValueError(f"expert_share={expert_share} must be from 0 to 1.")
        return cls(
            layer_ms=compute_ms * (1 - expert_share) / layers,
            expert_ms=compute_ms * expert_share / (layers * top_k),
            fetched_ms=fetched_ms,
            prediction_ms=prediction_ms,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySetting:
    """What is varied between replays of one trace.

    Attributes:
        cache_bytes: of the expert cache; 0: none but the buffers of `lookahead + 1` layers.
        cache_policy: who leaves a full cache.
        predictor: a name of `PREDICTORS`.
        speculation: what happens to predictions.
        bypasses: whether policy "adaptive" has spare places to compute experts from that it does
            not keep.
    """

    cache_bytes: int
    cache_policy: Policy
    predictor: str
    speculation: SessionOptions
    bypasses: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """Ranks that share a model's experts: each has E / N of them, a link and a cache of its own."""

    size: int = 1
    """N."""
    all_reduce_us: float = 0.0
    """what the sum over the ranks takes at the end of a layer, microseconds; the slowest rank is
    waited for besides."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1.")
        if not (self.all_reduce_us >= 0 and math.isfinite(self.all_reduce_us)):
            raise ValueError(f"all_reduce_us={self.all_reduce_us} must be 0 or more microseconds.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One step of a replay; times in milliseconds of simulated time."""

    ms: float
    stall_ms: float
    hits: int
    misses: int
    demand_bytes: int
    speculative_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What one replay did.

    Attributes:
        slots: S of each layer and rank, 0 without a cache.
        steps: every step, prefill too; counters of all ranks, stalls of the mean rank.
        layers: the counters of a session after the last step, of all ranks.
    """

    setting: ReplaySetting
    slots: tuple[int, ...]
    steps: list[StepCost]
    layers: tuple[LayerStats, ...]

    @property
    def total(self) -> LayerStats:
        """Counters of all layers and steps."""
        total = LayerStats()
        for layer in self.layers:
            total.add(layer)
        return total


def replay(
    steps: ReplaySteps,
    setting: ReplaySetting,
    link: Link,
    compute: ComputeTimes,
    *,
    ranks: RankGroup | None = None,
    on_step: Callable[[], object] | None = None,
) -> Replay:
    """Run a trace once.

    Args:
        steps: of the trace.
        setting: cache of each rank, and predictions.
        link, compute: how long things take; each rank has such a link, and computes all of a layer
            but the experts of the others.
        ranks: that share the experts; one by default.
        on_step: called after each step.

    Raises:
        ValueError: the cache does not hold one token's experts.
        UnsupportedModelError: the experts cannot be split evenly.
    """
    ranks = RankGroup() if ranks is None else ranks
    runs = [_Run(steps, setting, link, compute, rank, ranks.size) for rank in range(ranks.size)]
    costs: list[StepCost] = []
    for step in range(len(steps)):
        began_s = runs[0].now_s
        for run in runs:
            run.begin(step)
        for layer in range(steps.trace.layers):
            for run in runs:
                run.layer(step, layer)
            if ranks.size > 1:
                _meet(runs, ranks.all_reduce_us * 1e-6)
        of_ranks = [run.end() for run in runs]
        costs.append(_cost((runs[0].now_s - began_s) * 1e3, of_ranks))
        if on_step is not None:
            on_step()
    layers = tuple(_added(run.stats[layer] for run in runs) for layer in range(len(runs[0].stats)))
    return Replay(setting=setting, slots=runs[0].slots, steps=costs, layers=layers)


def _meet(runs: Sequence[_Run], cost_s: float) -> None:
    """Let all ranks wait for the slowest, and for the sum."""
    until_s = max(run.now_s for run in runs) + cost_s
    for run in runs:
        run.wait_until(until_s)


def _added(counters: Iterable[LayerStats]) -> LayerStats:
    total = LayerStats()
    for one in counters:
        total.add(one)
    return total


class _Run:
    """One rank of a replay under way: the runtime's parts on simulated time."""

    def __init__(
        self,
        steps: ReplaySteps,
        setting: ReplaySetting,
        link: Link,
        compute: ComputeTimes,
        rank: int,
        size: int,
    ) -> None:
        store: ExpertStore = sizes_only_store(steps)
        if size > 1:
            store = SliceStore(store, rank, size)
        self._rank, self._size = rank, size
        self._num_experts = store.num_experts
        self._steps = steps
        self._compute = compute
        self._predictor: Predictor | None = PREDICTORS[setting.predictor]
        self._lookahead = setting.speculation.lookahead
        self._link = SimulatedLink(link, largest_record_bytes=max(steps.trace.record_bytes))
        self.stats = tuple(LayerStats() for _ in store.layers)

        def compute_expert() -> None:
            self._link.advance(compute.expert_ms * 1e-3)

        runners = [
            TimedRunner(experts, compute_expert, is_slice=size > 1) for experts in store.num_experts
        ]
        tier = FastTier(
            store,
            self._link,
            runners,
            self.stats,
            top_k=store.top_k,
            reader_threads=link.readers,
            allocate=allocate_nothing,
            residency=functools.partial(TimedResidency, compute.fetched_ms * 1e-3, self._link),
        )
        residency = _residency(tier, setting)
        self.slots = _slots(residency)
        vectors = DefaultVectors(store.num_experts, [1] * len(runners))
        vectors.frozen = True
        self._speculator = Speculator(residency, runners, self.stats, vectors)
        self._speculator.use_options(setting.speculation)
        skips = setting.speculation.skips
        targets = [layer for layer in range(1, len(runners)) if not skips(layer)]
        # A layer nearer to the first one than `lookahead` is predicted from the first.
        self._edges = [(max(0, target - self._lookahead), target) for target in targets]
        self._targets: list[list[int]] = [[] for _ in runners]
        for source, target in self._edges:
            self._targets[source].append(target)
        self._split = [any(layer in edge for edge in self._edges) for layer in range(len(runners))]

    @property
    def now_s(self) -> float:
        return self._link.now_s()

    def wait_until(self, time_s: float) -> None:
        """Let time pass, for something else than reads."""
        self._link.advance(max(0.0, time_s - self.now_s))

    def begin(self, step: int) -> None:
        """Begin a step."""
        self._before = self._counters()
        self._splits = self._plan(step)
        self._tickets: dict[int, int] = {}

    def layer(self, step: int, layer: int) -> None:
        """Run a layer of the step."""
        self._link.advance(self._compute.layer_ms * 1e-3)
        x = self._steps.inputs[step]
        ids, weights = self._own(layer, self._steps.routed(step, layer))
        if self._splits[layer]:
            state = self._speculator.settle(self._tickets.get(layer, NO_TICKET), layer, ids)
            for target in self._targets[layer]:
                self._predict(step, target, self._tickets)
            partial = self._speculator.run(state, layer, x, ids, weights)
            self._speculator.correct(state, layer, partial, x, ids, weights)
        else:
            self._speculator.demand(layer, x, ids, weights)

    def end(self) -> tuple[LayerStats, LayerStats]:
        """End the step; the counters before and after it."""
        self._link.advance(self._compute.step_ms * 1e-3)
        return self._before, self._counters()

    def _own(self, layer: int, rows: Rows) -> Rows:
        """The rows as this rank sees them: ids of its own experts, E and weight 0 of others."""
        if self._size == 1:
            return rows
        ids, weights = rows
        experts = self._num_experts[layer]
        foreign = ids.div(experts, rounding_mode="floor") != self._rank
        return torch.where(foreign, experts, ids % experts), weights.masked_fill(foreign, 0.0)

    def _plan(self, step: int) -> Sequence[bool]:
        """Which layers run with wait and correction, as the graph of such a step has them."""
        count = len(self.stats)
        if self._predictor is None or self._steps.tokens[step] > MAX_DECODE_TOKENS:
            return [False] * count
        if not self._speculator.config.auto_off:
            return self._split
        flat = [layer for edge in self._edges for layer in edge]
        ids, _ = self._own(0, self._steps.routed(step, 0))
        return self._speculator.plan(range(count), flat, ids)

    def _predict(self, step: int, target: int, tickets: dict[int, int]) -> None:
        assert self._predictor is not None, "a step without a predictor is not split"
        prediction = self._predictor(self._steps, step, target)
        if prediction is None:
            return
        self._link.advance(self._compute.prediction_ms * 1e-3)
        tickets[target] = self._speculator.start(target, *self._own(target, prediction))

    def _counters(self) -> LayerStats:
        return _added(self.stats)


def _cost(ms: float, ranks: Sequence[tuple[LayerStats, LayerStats]]) -> StepCost:
    def counted(name: str) -> int:
        return sum(getattr(after, name) - getattr(before, name) for before, after in ranks)

    return StepCost(
        ms=ms,
        stall_ms=counted("stall_ms") / len(ranks),
        hits=counted("hits"),
        misses=counted("misses"),
        demand_bytes=counted("demand_bytes"),
        speculative_bytes=counted("speculative_bytes"),
    )


def _residency(tier: FastTier, setting: ReplaySetting) -> CachedResidency:
    if setting.cache_bytes == 0:
        return tier.buffered(setting.speculation)
    return tier.cached(setting.cache_bytes, setting.cache_policy, bypasses=setting.bypasses)


def _slots(residency: CachedResidency) -> tuple[int, ...]:
    table = residency.table
    return tuple(len(s) for s in table.expert_of) if isinstance(table, ExpertCache) else ()
