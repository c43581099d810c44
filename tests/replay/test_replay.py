"""Replays against real runs: the same experts hit and miss, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from specmoe_compile.options import SessionOptions
from specmoe_compile.replay.engine import ComputeTimes, Replay, ReplaySetting, replay
from specmoe_compile.replay.link import Link
from specmoe_compile.replay.measured import measured, timed_steps
from specmoe_compile.replay.steps import ReplaySteps
from specmoe_compile.replay.summary import Sweep
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.system.sizes import parse_size
from tests.replay.real_runs import RealRun, real_run

TOKENS = 24
LINK = Link(gbps=1.0)
COMPUTE = ComputeTimes(layer_ms=1.0, expert_ms=0.1)
# Everything that is started has arrived when the next layer begins.
FAST_LINK = Link(gbps=1e5)
ALWAYS = SessionOptions(auto_off=False)


def setting(
    trace: RoutingTrace,
    size: str | int,
    policy: Any = "lru",
    predictor: str = "none",
    speculation: SessionOptions = ALWAYS,
) -> ReplaySetting:
    return ReplaySetting(
        cache_bytes=parse_size(size, total_bytes=trace.total_bytes),
        cache_policy=policy,
        predictor=predictor,
        speculation=speculation,
    )


def counts(done: Replay | Stats, *names: str) -> list[tuple[int, ...]]:
    """Counters of each layer, hits and misses and others."""
    wanted = ("steps", "hits", "misses", *names)
    return [tuple(getattr(layer, name) for name in wanted) for layer in done.layers]


SPECULATION = (
    "prefetches",
    "needed",
    "predicted",
    "recalled",
    "demand_bytes",
    "speculative_bytes",
    "useful_speculative_bytes",
    "wasted_speculative_bytes",
)


@pytest.mark.parametrize(
    ("size", "policy", "batch", "prompt"),
    [
        (0, "lru", 1, 20),
        (0, "lru", 3, 4),
        ("25%", "lru", 1, 20),
        ("25%", "adaptive", 1, 5),
        ("25%", "lfu", 3, 4),
        ("30%", "lfu", 1, 20),
        ("50%", "lru", 3, 20),
        ("100%", "lru", 1, 20),
    ],
)
def test_without_prefetch_every_layer_hits_and_misses_as_it_did(
    size: str | int, policy: str, batch: int, prompt: int, tmp_path: Path
) -> None:
    """Prefill (20 tokens), a short prompt (5), and a batch whose experts exceed the slots."""
    run = real_run(tmp_path, expert_cache=size, policy=policy, batch=batch, prompt=prompt)
    done = replay(ReplaySteps(run.trace), setting(run.trace, size, policy), LINK, COMPUTE)
    assert counts(done, "demand_bytes") == counts(run.stats, "demand_bytes")
    assert run.stats.total.misses > 0


@pytest.mark.slow
def test_the_time_of_a_token_is_predicted_within_a_tenth(tmp_path: Path) -> None:
    """A disk that takes 40 ms per record; computing is that of a run with everything cached.

    What a real disk and all processors do to these times: `benchmarks.simulation.replay_check`.
    """
    cached = real_run(tmp_path / "all", expert_cache="100%", layers=4).trace
    computing = measured(cached, cached.decode_steps()[TOKENS:]).compute_ms
    run = real_run(tmp_path / "few", expert_cache="25%", read_s=0.04, layers=4)
    steps = run.trace.decode_steps()
    own_ms = measured(run.trace, steps).tpot_ms
    assert computing is not None and own_ms is not None
    link = Link(gbps=run.trace.record_bytes[0] / 0.04 / 1e9, readers=1)
    times = ComputeTimes.split(computing, layers=4, top_k=3, expert_share=0.5)
    done = replay(ReplaySteps(run.trace), setting(run.trace, "25%"), link, times)
    predicted_ms = fmean(done.steps[step].ms for step in timed_steps(run.trace, steps))
    assert counts(done) == counts(run.stats)
    assert predicted_ms == pytest.approx(own_ms, rel=0.1)
    assert predicted_ms > 3 * computing, "most of it is reading"


def test_a_trace_replays_other_caches_than_its_own(tmp_path: Path) -> None:
    small = real_run(tmp_path / "small", expert_cache="25%")
    large = real_run(tmp_path / "large", expert_cache="60%", policy="lfu")
    done = replay(ReplaySteps(small.trace), setting(small.trace, "60%", "lfu"), LINK, COMPUTE)
    assert counts(done) == counts(large.stats)
    assert done.total.hits > small.stats.total.hits


SLOW = pytest.mark.slow


@pytest.mark.parametrize("size", ["25%", pytest.param(0, marks=SLOW)])
def test_right_predictions_replay_as_they_ran(size: str | int, tmp_path: Path) -> None:
    """With `control` no guess is wrong, so that nothing that is decided depends on time."""
    run = real_run(tmp_path, expert_cache=size, options={"control": True, "auto_off": False})
    steps = ReplaySteps(run.trace)
    done = replay(steps, setting(run.trace, size, predictor="recorded"), LINK, COMPUTE)
    assert counts(done, *SPECULATION) == counts(run.stats, *SPECULATION)
    assert run.stats.total.prefetches > 0 and run.stats.total.recall == 1.0


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param(0, {}, marks=SLOW),
        ("25%", {}),
        pytest.param("50%", {}, marks=SLOW),
        pytest.param("40%", {"lookahead": 2}, marks=SLOW),
        pytest.param("40%", {"prefetch_width": 2}, marks=SLOW),
        pytest.param("40%", {"skip_layers": (2,)}, marks=SLOW),
        ("40%", {"policy": "default_vector", "default_vector_threshold": 0.3}),
        pytest.param("40%", {"policy": "commit"}, marks=SLOW),
    ],
)
def test_wrong_predictions_replay_as_they_ran_where_reads_take_no_time(
    size: str | int, options: dict[str, Any], tmp_path: Path
) -> None:
    run = real_run(
        tmp_path, expert_cache=size, options={"auto_off": False, **options}, reads_at_once=True
    )
    speculation = replace(ALWAYS, **options)
    steps = ReplaySteps(run.trace)
    one = setting(run.trace, size, predictor="recorded", speculation=speculation)
    done = replay(steps, one, FAST_LINK, COMPUTE)
    names = (*SPECULATION, "skipped_experts", "cancelled_prefetches")
    assert counts(done, *names) == counts(run.stats, *names)
    assert 0.0 < run.stats.total.recall < 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    """Predictions recorded with every layer predicted, on a real disk."""
    folder = tmp_path_factory.mktemp("run")
    return real_run(folder, expert_cache="25%", options={"auto_off": False})


def test_prefetch_on_a_real_disk_recalls_the_same(run: RealRun) -> None:
    """What is predicted and needed does not depend on time; what arrives and is cancelled does."""
    done = replay(
        ReplaySteps(run.trace), setting(run.trace, "25%", predictor="recorded"), LINK, COMPUTE
    )
    names = ("needed", "predicted", "recalled")
    assert [[getattr(layer, n) for n in names] for layer in done.layers] == [
        [getattr(layer, n) for n in names] for layer in run.stats.layers
    ]


def test_a_slower_link_costs_what_its_bytes_take(run: RealRun) -> None:
    """Without overlap, a step takes its computing and the bytes that it misses."""
    steps = ReplaySteps(run.trace)
    one = setting(run.trace, "25%")
    link = Link(gbps=0.01, readers=1)
    done = replay(steps, one, link, ComputeTimes(layer_ms=1.0, expert_ms=0.0))
    for cost in done.steps:
        assert cost.ms == pytest.approx(cost.stall_ms + 1.0 * run.trace.layers)
        assert cost.stall_ms == pytest.approx(cost.demand_bytes / 0.01e9 * 1e3, rel=1e-6)


@pytest.mark.parametrize("predictor", ["none", "perfect"])
def test_each_fetched_expert_costs_its_extra_once(predictor: str, run: RealRun) -> None:
    """Demanded or predicted, there in time or late: once, when it is first used."""
    steps = ReplaySteps(run.trace)
    compute = ComputeTimes(layer_ms=1.0, expert_ms=0.0, fetched_ms=0.5)
    one = setting(run.trace, "50%", predictor=predictor)
    done = replay(steps, one, FAST_LINK, compute)
    total = done.total
    used = total.misses + total.useful_speculative_bytes // run.trace.record_bytes[0]
    assert used > total.misses or predictor == "none"
    spent_ms = sum(cost.ms for cost in done.steps)
    layers = len(steps) * run.trace.layers
    assert spent_ms == pytest.approx(layers * 1.0 + used * 0.5, rel=1e-3)


def test_perfect_prediction_hides_computing_and_no_more(run: RealRun) -> None:
    steps = ReplaySteps(run.trace)
    record_ms = run.trace.record_bytes[0] / 1e6
    compute = ComputeTimes(layer_ms=record_ms, expert_ms=0.0)
    times = {
        name: Sweep(steps, Link(gbps=1.0), compute)
        .run(setting(run.trace, 0, predictor=name), name="0")
        .tpot_ms
        for name in ("none", "perfect")
    }
    layers, top_k = run.trace.layers, run.trace.top_k
    assert times["none"] == pytest.approx(layers * (1 + top_k) * record_ms)
    # All but the first layer's records travel during the layer before: one of K each.
    assert times["perfect"] == pytest.approx((layers * top_k + 1) * record_ms)


def test_belady_is_above_every_policy_and_counts_the_same_requests(run: RealRun) -> None:
    sweep = Sweep(ReplaySteps(run.trace), LINK, COMPUTE, warmup_steps=2)
    for size in ("25%", "50%", "100%"):
        bounds = set()
        for policy in ("lru", "lfu", "adaptive"):
            summary = sweep.run(setting(run.trace, size, policy), name=size)
            assert summary.belady_hit_rate is not None
            assert summary.hit_rate <= summary.belady_hit_rate <= 1.0
            bounds.add(summary.belady_hit_rate)
        assert len(bounds) == 1
    assert bounds == {1.0}, "a cache that holds everything can miss nothing"


def test_sufficient_cache_is_the_smallest_that_is_nearly_as_fast_as_all(run: RealRun) -> None:
    sweep = Sweep(ReplaySteps(run.trace), Link(gbps=0.05), COMPUTE, warmup_steps=2)
    base = setting(run.trace, "25%")
    slots, size_bytes = sweep.sufficient_bytes(base)
    slot_bytes = sum(run.trace.record_bytes)
    assert size_bytes == slots * slot_bytes

    def tpot_ms(count: int) -> float:
        return sweep.run(setting(run.trace, count * slot_bytes), name="").tpot_mean_ms

    max_ms = 1.05 * tpot_ms(max(run.trace.num_experts))
    assert tpot_ms(slots) <= max_ms < tpot_ms(slots - 1)


def test_previous_token_is_its_own_prediction(run: RealRun) -> None:
    """Recall counted by hand from the trace equals that of the replay."""
    steps = ReplaySteps(run.trace)
    done = replay(steps, setting(run.trace, "25%", predictor="previous"), LINK, COMPUTE)
    recalled = needed = 0
    for step, tokens in enumerate(steps.tokens):
        if tokens != 1:
            continue
        for layer in range(1, run.trace.layers):
            before = steps.routed(step - 1, layer)[0][-1].tolist()
            now = steps.routed(step, layer)[0][0].tolist()
            recalled += len(set(before) & set(now))
            needed += len(now)
    assert (done.total.recalled, done.total.needed) == (recalled, needed)
    assert recalled > 0


def test_sweep_refuses_a_trace_with_nothing_to_count(run: RealRun) -> None:
    with pytest.raises(ValueError, match="decode steps, and 1000 of them are warm-up"):
        Sweep(ReplaySteps(run.trace), LINK, COMPUTE, warmup_steps=1000)


@pytest.mark.parametrize(
    "values", [{"layer_ms": -1.0, "expert_ms": 0.0}, {"layer_ms": 0.0, "expert_ms": float("nan")}]
)
def test_impossible_times_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 or more milliseconds"):
        ComputeTimes(**values)
