"""Policies in C++ and in Python: the same integers and decisions, whatever is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from ctypes import c_int64
from pathlib import Path
from typing import Any

import pytest

from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.cpu.native.steps import cache_tables
from specmoe_compile.runtime.policy.prefetch_judge import PrefetchJudge
from specmoe_compile.runtime.transfer.base import DONE, Issued, Read

TRACE = Path(__file__).resolve().parents[3] / "benchmarks/results/reference_trace.safetensors"
POLICIES = ("lru", "lfu", "adaptive")


def plan_in_cpp(
    cache: ExpertCache,
    layer: int,
    experts: list[int],
    *,
    pinned_slots: Sequence[int] = (),
    speculative: bool = False,
) -> dict[str, Any]:
    """`ExpertCache.plan` of distinct experts, by the library."""
    library = library_or_none()
    assert library is not None
    count, pins = len(experts), len(pinned_slots)
    wanted, placed = (c_int64 * count)(*experts), (c_int64 * (2 * count))()
    evicted, counts = (c_int64 * count)(), (c_int64 * 3)()
    library.specmoe_cache_plan(
        *(cache_tables(cache, layer), wanted, count, (c_int64 * pins)(*pinned_slots), pins),
        *(speculative, placed, evicted, counts),
    )
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


def check_step(
    python: ExpertCache, native: ExpertCache, layer: int, experts: list[int], **kwargs: Any
) -> None:
    expected = python.plan(layer, experts, **kwargs)
    got = plan_in_cpp(native, layer, experts, **kwargs)
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
            guesses = rng.sample(range(experts), min(experts, 3))
            pinned = [rng.randrange(slots)]
            check_step(*caches, 1, guesses, speculative=True, pinned_slots=pinned)
            for cache in caches:  # a failed read is Python's, in the same tables
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


@pytest.mark.parametrize("seed", range(4))
def test_a_judge_admits_the_same(seed: int) -> None:
    library = library_or_none()
    assert library is not None
    rng, judge = random.Random(seed), PrefetchJudge(2)
    pointer = library.specmoe_judge_new(2)
    refused = 0
    try:
        for step in range(3000):
            layer = step % 2
            predicts = judge.predicts(layer)
            assert library.specmoe_judge_predicts(pointer, layer) == predicts
            if not predicts:
                refused += 1
                continue
            width = 4
            experts = rng.sample(range(32), rng.randint(1, 9))
            count = len(experts)
            out = (c_int64 * (3 * count))()
            library.specmoe_judge_admitted(
                pointer, layer, (c_int64 * count)(*experts), count, width, out
            )
            admitted, ranks = judge.admitted(layer, experts, width)
            got = list(zip(out[::3], out[1::3], out[2::3], strict=True))
            assert {e: rank for e, rank, _ in got} == ranks
            assert [e for e, _, is_open in got if is_open] == admitted
            wanted = {e for e in experts if rng.random() > 0.3 + 0.2 * ranks[e] + 0.3 * layer}
            reads = {}
            for expert in admitted:
                reads[expert] = Read(layer, expert, None, speculative=True)  # type: ignore[arg-type]
                reads[expert].state = DONE
            judge.measure(layer, Issued(reads, []), ranks, wanted)
            pairs = [value for e in admitted for value in (ranks[e], int(e in wanted))]
            library.specmoe_judge_measure(
                pointer, layer, (c_int64 * len(pairs))(*pairs), len(admitted)
            )
    finally:
        library.specmoe_judge_delete(pointer)
    assert 0 < refused < 3000
