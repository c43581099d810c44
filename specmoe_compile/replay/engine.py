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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.options import MAX_DECODE_TOKENS, SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.replay.link import Link, SimulatedLink
from specmoe_compile.replay.predictors import PREDICTORS, Predictor
from specmoe_compile.replay.steps import ReplaySteps
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.cpu.fast_tier import FastTier
from specmoe_compile.runtime.cpu.residency import Step
from specmoe_compile.runtime.cpu.speculator import Speculator
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer
from specmoe_compile.runtime.store.base import ExpertStore

NO_TICKET = -1
_NO_WEIGHTS = ExpertTensors(WeightPlanes(torch.empty(0)), None, WeightPlanes(torch.empty(0)), None)


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
            not keep, as on a CPU.
    """

    cache_bytes: int
    cache_policy: Policy
    predictor: str
    speculation: SessionOptions
    bypasses: bool = True


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
        slots: S of each layer, 0 without a cache.
        steps: every step, prefill too.
        layers: the counters of a session after the last step.
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


class SizesOnlyStore(ExpertStore):
    """A store of which only the sizes are known."""

    kind = "disk"

    def read_into(self, layer: int, expert: int, record: Tensor | memoryview) -> None:
        raise NotImplementedError("a replay reads nothing")

    def close(self) -> None:
        pass


class TimedRunner(ExpertRunner):
    """An experts layer that takes its time and computes nothing."""

    def __init__(self, num_experts: int, compute: Callable[[], None]) -> None:
        self.num_experts = num_experts
        self.hidden_size = 1
        self.dtype = torch.float32
        self.native = None
        self.foreign = None
        self._compute = compute

    def weights(self, record: Tensor) -> ExpertTensors:
        return _NO_WEIGHTS

    def run(self, weights: ExpertTensors, x: Tensor) -> Tensor:
        self._compute()
        return x


class TimedResidency(CachedResidency):
    """Takes its time for each expert that is used for the first time since it was read."""

    def __init__(self, fetched_s: float, link: SimulatedLink, *parts: Any) -> None:
        super().__init__(*parts)
        self._fetched_s = fetched_s
        self._link = link

    def begin(self, layer: int, experts: Sequence[int], *, prefill: bool) -> Step:
        stats, size_bytes = self._stats[layer], self._record_bytes[layer]
        before = stats.useful_speculative_bytes // size_bytes - stats.late_prefetches
        step = super().begin(layer, experts, prefill=prefill)
        # Prefetched and already there; the others are counted as they arrive.
        fresh = stats.useful_speculative_bytes // size_bytes - stats.late_prefetches - before
        self._link.advance(fresh * self._fetched_s)
        return step

    def next_or_none(self, step: Step, *, block: bool) -> tuple[int, ExpertTensors] | None:
        arrival = super().next_or_none(step, block=block)
        if arrival is not None:
            self._link.advance(self._fetched_s)
        return arrival


def replay(
    steps: ReplaySteps,
    setting: ReplaySetting,
    link: Link,
    compute: ComputeTimes,
    *,
    on_step: Callable[[], object] | None = None,
) -> Replay:
    """Run a trace once.

    Args:
        steps: of the trace.
        setting: cache and predictions.
        link, compute: how long things take.
        on_step: called after each step.

    Raises:
        ValueError: the cache does not hold one token's experts.
    """
    run = _Run(steps, setting, link, compute)
    costs: list[StepCost] = []
    for step in range(len(steps)):
        costs.append(run.step(step))
        if on_step is not None:
            on_step()
    return Replay(setting=setting, slots=run.slots, steps=costs, layers=run.stats)


def allocate_nothing(size_bytes: int) -> Tensor:
    """Return memory that has a size and no content, [size_bytes] uint8."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="meta")


def sizes_only_store(steps: ReplaySteps) -> SizesOnlyStore:
    """Return a store with the sizes of a trace's experts."""
    trace = steps.trace
    layers = [
        StoreLayer(
            name=f"layer {index}",
            num_experts=experts,
            layout=ExpertLayout(tensors=(), record_bytes=size),
        )
        for index, (experts, size) in enumerate(
            zip(trace.num_experts, trace.record_bytes, strict=True)
        )
    ]
    return SizesOnlyStore(layers, fingerprint=trace.fingerprint, top_k=trace.top_k)


class _Run:
    """One replay under way: the runtime's parts on simulated time."""

    def __init__(
        self, steps: ReplaySteps, setting: ReplaySetting, link: Link, compute: ComputeTimes
    ) -> None:
        store = sizes_only_store(steps)
        self._steps = steps
        self._compute = compute
        self._predictor: Predictor | None = PREDICTORS[setting.predictor]
        self._lookahead = setting.speculation.lookahead
        self._link = SimulatedLink(link, largest_record_bytes=max(steps.trace.record_bytes))
        self.stats = tuple(LayerStats() for _ in store.layers)

        def compute_expert() -> None:
            self._link.advance(compute.expert_ms * 1e-3)

        runners = [TimedRunner(experts, compute_expert) for experts in store.num_experts]
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

    def step(self, step: int) -> StepCost:
        """Run one step through all layers."""
        before, began_s = self._counters(), self._link.now_s()
        layers = range(len(self.stats))
        splits = self._plan(step)
        tickets: dict[int, int] = {}
        for layer in layers:
            self._link.advance(self._compute.layer_ms * 1e-3)
            x = self._steps.inputs[step]
            ids, weights = self._steps.routed(step, layer)
            if splits[layer]:
                state = self._speculator.settle(tickets.get(layer, NO_TICKET), layer, ids)
                for target in self._targets[layer]:
                    self._predict(step, target, tickets)
                partial = self._speculator.run(state, layer, x, ids, weights)
                self._speculator.correct(state, layer, partial, x, ids, weights)
            else:
                self._speculator.demand(layer, x, ids, weights)
        self._link.advance(self._compute.step_ms * 1e-3)
        after = self._counters()
        ms = (self._link.now_s() - began_s) * 1e3
        return _cost(ms, before, after)

    def _plan(self, step: int) -> Sequence[bool]:
        """Which layers run with wait and correction, as the graph of such a step has them."""
        count = len(self.stats)
        if self._predictor is None or self._steps.tokens[step] > MAX_DECODE_TOKENS:
            return [False] * count
        if not self._speculator.config.auto_off:
            return self._split
        flat = [layer for edge in self._edges for layer in edge]
        ids, _ = self._steps.routed(step, 0)
        return self._speculator.plan(range(count), flat, ids)

    def _predict(self, step: int, target: int, tickets: dict[int, int]) -> None:
        assert self._predictor is not None, "a step without a predictor is not split"
        prediction = self._predictor(self._steps, step, target)
        if prediction is None:
            return
        self._link.advance(self._compute.prediction_ms * 1e-3)
        tickets[target] = self._speculator.start(target, *prediction)

    def _counters(self) -> LayerStats:
        total = LayerStats()
        for layer in self.stats:
            total.add(layer)
        return total


def _cost(ms: float, before: LayerStats, after: LayerStats) -> StepCost:
    return StepCost(
        ms=ms,
        stall_ms=after.stall_ms - before.stall_ms,
        hits=after.hits - before.hits,
        misses=after.misses - before.misses,
        demand_bytes=after.demand_bytes - before.demand_bytes,
        speculative_bytes=after.speculative_bytes - before.speculative_bytes,
    )


def _residency(tier: FastTier, setting: ReplaySetting) -> CachedResidency:
    if setting.cache_bytes == 0:
        return tier.buffered(setting.speculation)
    return tier.cached(setting.cache_bytes, setting.cache_policy, bypasses=setting.bypasses)


def _slots(residency: CachedResidency) -> tuple[int, ...]:
    table = residency.table
    return tuple(len(s) for s in table.expert_of) if isinstance(table, ExpertCache) else ()
