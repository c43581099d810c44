"""The cache policy: who gets a slot, who leaves, and what may never leave."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_compile.runtime.cache.slot_table import NOBODY, ExpertCache, belady_hits


def cache(slots: int = 3, experts: int = 8, **kwargs: Any) -> ExpertCache:
    return ExpertCache(num_experts=[experts], slots=[slots], **kwargs)


def test_empty_slots_are_filled_in_order() -> None:
    plan = cache().plan(0, [5, 1, 5])
    assert (plan.hits, plan.fills, plan.bypassed, plan.evicted) == ([], [(5, 0), (1, 1)], [], [])


def test_lru_evicts_what_was_used_longest_ago() -> None:
    table = cache()
    for expert in (0, 1, 2, 0):
        table.plan(0, [expert])
    plan = table.plan(0, [3])
    assert plan.evicted == [1]
    assert table.slot(0, 1) == NOBODY and table.slot(0, 3) == 1


def test_lfu_evicts_what_was_used_least() -> None:
    table = cache(policy="lfu")
    for expert in (0, 0, 0, 1, 2, 2, 1, 1):
        table.plan(0, [expert])
    assert table.plan(0, [3]).evicted == [2]


def test_lfu_forgets_old_popularity() -> None:
    table = cache(2, policy="lfu")
    for expert, times in ((0, 60), (1, 30)):
        for _ in range(times):
            table.plan(0, [expert])
    assert table.plan(0, [2]).evicted == [1]
    table = cache(2, policy="lfu")
    for expert, times in ((0, 60), (1, 200)):
        for _ in range(times):
            table.plan(0, [expert])
    assert table.plan(0, [2]).evicted == [0]


def misses(policy: Any, stream: list[list[int]], slots: int, experts: int) -> list[int]:
    """Misses of each step."""
    table = cache(slots, experts, policy=policy)
    return [len(wanted) - len(table.plan(0, wanted).hits) for wanted in stream]


def zipf(rng: random.Random, names: list[int], steps: int) -> list[list[int]]:
    """Pairs of experts, the first names far oftener than the last."""
    weights = [1 / (1 + rank) for rank in range(len(names))]
    return [list(dict.fromkeys(rng.choices(names, weights, k=2))) for _ in range(steps)]


def test_adaptive_counts_where_counting_pays() -> None:
    rng = random.Random(0)
    stream = zipf(rng, list(range(16)), 3000)
    by = {policy: sum(misses(policy, stream, 4, 16)) for policy in ("lru", "lfu", "adaptive")}
    assert by["lfu"] < 0.9 * by["lru"]
    assert by["adaptive"] <= 1.02 * by["lfu"]


def test_adaptive_is_recent_where_only_recency_pays() -> None:
    """Each expert is wanted in one run of steps and then never for long: counts hold on to it."""
    rng = random.Random(1)
    stream: list[list[int]] = []
    for _ in range(300):
        group = rng.sample(range(32), 4)
        stream += [rng.sample(group, 2) for _ in range(12)]
    by = {policy: sum(misses(policy, stream, 6, 32)) for policy in ("lru", "lfu", "adaptive")}
    assert by["lru"] < 0.9 * by["lfu"]
    assert by["adaptive"] < 1.05 * by["lru"]


def test_adaptive_follows_a_change_of_topic() -> None:
    rng = random.Random(2)
    names = list(range(16))
    turned = names[::-1]
    stream = zipf(rng, names, 3000) + zipf(rng, turned, 600)
    after = {p: sum(misses(p, stream, 4, 16)[3200:]) for p in ("lru", "adaptive")}
    assert after["adaptive"] < after["lru"]


@pytest.mark.parametrize("guesses", [0, 1])
def test_one_step_in_four_is_judged_however_many_numbers_steps_take(guesses: int) -> None:
    table = ExpertCache(num_experts=[8], slots=[2], policy="adaptive")
    judged = 0
    for step in range(64):
        before = table.scores[0].regret.copy()
        table.plan(0, [step % 8])  # a step asks for what no candidate kept: misses are added
        judged += bool((table.scores[0].regret[:-1] != before[:-1]).any())
        for _ in range(guesses):
            table.plan(0, [(step + 1) % 8], speculative=True)
    assert judged == 16


def test_adaptive_does_not_keep_what_is_worth_less_than_all_that_is_there() -> None:
    table = cache(2, policy="adaptive", spare=1)
    for _ in range(4):
        table.plan(0, [0, 1])
    plan = table.plan(0, [2, 3])
    assert plan.bypassed == [2], "there is one spare place"
    assert plan.fills == [(3, 0)] and plan.evicted == [0]
    for _ in range(6):
        plan = table.plan(0, [2])
    assert table.slot(0, 2) >= 0, "it is wanted often now"


def test_a_guess_and_a_prompt_use_no_spare_place() -> None:
    table = cache(2, policy="adaptive", spare=2)
    for _ in range(4):
        table.plan(0, [0, 1])
    assert table.plan(0, [2], speculative=True).fills == [(2, 0)]
    assert table.plan(0, [3], bypass=True).bypassed == [3]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_only_adaptive_uses_spare_places(policy: Any) -> None:
    table = cache(2, policy=policy, spare=2)
    for _ in range(4):
        table.plan(0, [0, 1])
    assert table.plan(0, [2]).bypassed == []


def test_spare_places_bring_adaptive_nearer_to_the_best() -> None:
    stream = zipf(random.Random(3), list(range(16)), 2000)
    tables = [cache(4, 16, policy="adaptive", spare=spare) for spare in (0, 2)]
    without, spared = (sum(len(t.plan(0, step).hits) for step in stream) for t in tables)
    assert without < 0.98 * spared
    assert spared <= belady_hits(stream, 4, may_bypass=True)


def test_a_plan_never_evicts_its_own_experts() -> None:
    table = cache(2)
    table.plan(0, [0, 1])
    plan = table.plan(0, [2, 0, 3])
    assert plan.hits == [(0, 0)]
    assert plan.evicted == [1]
    assert plan.fills == [(2, 1)] and plan.bypassed == [3]


def test_pinned_slots_stay() -> None:
    table = cache(2)
    table.plan(0, [0, 1])
    plan = table.plan(0, [2], pinned_slots=[0, 1])
    assert plan.bypassed == [2] and not plan.evicted


def test_bypass_fills_empty_slots_and_evicts_nothing() -> None:
    table = cache(3)
    table.plan(0, [0, 1])
    plan = table.plan(0, [2, 3, 4], bypass=True)
    assert plan.fills == [(2, 2)] and plan.bypassed == [3, 4] and not plan.evicted


def test_speculative_hits_are_not_uses() -> None:
    table = cache(2)
    table.plan(0, [0])
    table.plan(0, [1])
    table.plan(0, [0], speculative=True)
    assert table.plan(0, [2]).evicted == [0]


def test_forgotten_expert_frees_its_slot_first() -> None:
    table = cache(2)
    table.plan(0, [0, 1])
    table.forget(0, 1)
    table.forget(0, 7)
    assert table.slot(0, 1) == NOBODY
    assert table.plan(0, [2]).fills == [(2, 1)]


def test_layers_are_separate() -> None:
    table = ExpertCache(num_experts=[4, 4], slots=[1, 1])
    table.plan(0, [0])
    assert table.slot(1, 0) == NOBODY and table.plan(1, [0]).fills == [(0, 0)]


@pytest.mark.parametrize(
    "wrong", [{"policy": "fifo"}, {"slots": [0]}, {"slots": [1, 1]}, {"spare": -1}]
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"policy|slot|spare"):
        ExpertCache(**{"num_experts": [4], "slots": [2], **wrong})


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tables_stay_consistent(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 6))
    experts = data.draw(st.integers(slots, 10))
    policy = data.draw(st.sampled_from(["lru", "lfu", "adaptive"]))
    table = cache(slots, experts, policy=policy, spare=data.draw(st.integers(0, 3)))
    for _ in range(data.draw(st.integers(1, 25))):
        wanted = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=8))
        pinned = data.draw(st.sets(st.integers(0, slots - 1)))
        kept = [table.expert_of[0][slot] for slot in pinned]
        options = {name: data.draw(st.booleans()) for name in ("bypass", "speculative")}
        plan = table.plan(0, wanted, pinned_slots=pinned, **options)
        placed = [expert for expert, _ in plan.hits + plan.fills]
        assert sorted(placed + plan.bypassed) == sorted(set(wanted))
        assert all(table.slot(0, expert) == slot for expert, slot in plan.hits + plan.fills)
        assert all(table.slot(0, expert) == NOBODY for expert in plan.evicted + plan.bypassed)
        assert [table.expert_of[0][slot] for slot in pinned] == kept
        assert not (options["bypass"] and plan.evicted)
        for expert, slot in enumerate(table.slot_of[0]):
            assert slot == NOBODY or table.expert_of[0][slot] == expert
        assert sum(e != NOBODY for e in table.expert_of[0]) == sum(
            s != NOBODY for s in table.slot_of[0]
        )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=3), max_size=25), st.integers(3, 7))
def test_no_policy_beats_belady(steps: list[set[int]], slots: int) -> None:
    requests = [sorted(step) for step in steps]
    best = belady_hits(requests, slots)
    for policy in ("lru", "lfu", "adaptive"):
        table = cache(slots, 7, policy=policy)
        assert sum(len(table.plan(0, step).hits) for step in requests) <= best
    passing = belady_hits(requests, slots, may_bypass=True)
    table = cache(slots, 7, policy="adaptive", spare=3)
    assert best <= passing
    assert sum(len(table.plan(0, step).hits) for step in requests) <= passing


def test_belady_of_a_known_sequence() -> None:
    # Two slots: 0 1 fill; 2 replaces 1, which is needed later than 0; 0 hits; 1 replaces 2.
    assert belady_hits([[0], [1], [2], [0], [1]], 2) == 1
    # 2 is computed and not kept: 0 and 1 both hit.
    assert belady_hits([[0], [1], [2], [0], [1]], 2, may_bypass=True) == 2


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
def test_a_guess_that_is_taken_back_leaves_the_cache_as_it_was(policy: Any) -> None:
    table = cache(policy=policy)
    for experts in ([0, 1], [2], [1]):
        table.plan(0, experts)
    tables = (table.slot_of, table.expert_of, table.last_use, table.scores[0].table)
    before = [[list(row) for row in table] for table in tables]
    plan = table.plan(0, [5, 6], speculative=True)
    assert plan.evicted == [0, 2]
    assert [table.take_back(0, expert) for expert in (6, 5)] == [2, 0]
    assert [[list(row) for row in table] for table in tables] == before


def test_a_slot_is_not_given_back_to_what_is_elsewhere_or_was_no_guess() -> None:
    table = cache(2)
    table.plan(0, [0, 1])
    (_, slot), *_ = table.plan(0, [5], speculative=True).fills
    table.plan(0, [0], pinned_slots=[slot])  # it takes the other slot
    assert table.take_back(0, 5) == -1
    assert table.slot(0, 5) == -1 and table.expert_of[0][slot] == -1
    table.plan(0, [6], speculative=True)
    assert table.take_back(0, 6) == -1, "it was empty"
    table.plan(0, [6], speculative=True)
    table.plan(0, [3, 4])  # a demand fill is what the slots hold since
    table.forget(0, 3)
    assert table.slot(0, 4) >= 0 and table.slot(0, 6) == -1
    assert table.take_back(0, 4) == -1
