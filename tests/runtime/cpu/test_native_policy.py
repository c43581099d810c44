"""The cache policy in C++ and in Python: the same integers, whatever is asked for."""

from __future__ import annotations

import random
from ctypes import c_int64
from pathlib import Path
from typing import Any

import pytest

from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.cpu.native.steps import cache_tables

TRACE = Path(__file__).resolve().parents[3] / "benchmarks/results/reference_trace.safetensors"
POLICIES = ("lru", "lfu", "adaptive")


def plan_in_cpp(cache: ExpertCache, layer: int, experts: list[int]) -> dict[str, Any]:
    """`ExpertCache.plan` of distinct experts, by the library."""
    library = library_or_none()
    assert library is not None
    count = len(experts)
    wanted, placed = (c_int64 * count)(*experts), (c_int64 * (2 * count))()
    evicted, counts = (c_int64 * count)(), (c_int64 * 3)()
    library.specmoe_cache_plan(cache_tables(cache, layer), wanted, count, placed, evicted, counts)
    hits, fills, gone = counts
    pairs = list(zip(placed[::2], placed[1::2], strict=True))
    return {
        "hits": pairs[:hits],
        "fills": pairs[hits : hits + fills],
        "evicted": evicted[:gone],
    }


def state(cache: ExpertCache, layer: int) -> tuple[Any, ...]:
    scores = cache.scores[layer]
    return (
        list(cache.slot_of[layer]),
        list(cache.expert_of[layer]),
        list(cache.last_use[layer]),
        cache.clock[layer],
        scores.table.tolist(),
        scores.regret.tolist(),
    )


def check_step(python: ExpertCache, native: ExpertCache, layer: int, experts: list[int]) -> None:
    expected = python.plan(layer, experts)
    got = plan_in_cpp(native, layer, experts)
    assert got == {name: getattr(expected, name) for name in got}
    assert state(native, layer) == state(python, layer)


@pytest.fixture(autouse=True)
def needs_library() -> None:
    if library_or_none() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_random_steps_give_the_same_plans_and_tables(policy: Any, seed: int) -> None:
    rng = random.Random(seed)
    experts = rng.choice([2, 5, 32, 128])
    slots = rng.randint(1, experts)
    sizes: dict[str, Any] = {"num_experts": [3, experts], "slots": [2, slots], "spare": seed % 4}
    caches = [ExpertCache(**sizes, policy=policy) for _ in range(2)]
    for cache in caches:
        if slots > 2:
            cache.expert_of[1][slots // 2] = experts  # out of use
    for step in range(400):
        names = rng.sample(range(experts), rng.randint(1, min(experts, 10)))
        if step % 50 > 25:  # a topic
            names = sorted({name % max(1, experts // 3) for name in names})
        check_step(*caches, 1, names)
        if step % 17 == 0:
            # Guesses, prefill and failed reads are Python's, in the same tables.
            guess = rng.sample(range(experts), 1)
            pinned = [rng.randrange(slots)]
            for cache in caches:
                cache.plan(1, guess, speculative=True, pinned_slots=pinned)
                cache.forget(1, names[0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [0.125, 0.5])
def test_a_recorded_model_gives_the_same_plans_and_tables(policy: Any, share: float) -> None:
    trace = RoutingTrace.load(TRACE)
    slots = [max(trace.top_k, int(share * experts)) for experts in trace.num_experts]
    sizes: dict[str, Any] = {"num_experts": trace.num_experts, "slots": slots, "spare": trace.top_k}
    caches = [ExpertCache(**sizes, policy=policy) for _ in range(2)]
    rows = trace.tensors["ids"].tolist()[-200:]
    for row in rows:
        for layer, chosen in enumerate(row):
            check_step(*caches, layer, list(dict.fromkeys(e for e in chosen if e >= 0)))
    assert len(rows) == 200
    assert all(cache.clock[0] == 200 for cache in caches)
