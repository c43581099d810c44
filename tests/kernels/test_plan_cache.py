"""`plan_cache` against the runtime's Python policy, driven with the same streams of ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_compile.kernels.plan_cache.op import (
    COUNTERS,
    MAX_CHOICES,
    CachePlanTensors,
    CacheTables,
    plan_cache,
)
from specmoe_compile.runtime.cache.eviction import RECENCY
from tests.kernels.expert_cases import DEVICE
from tests.kernels.plan_cases import (
    ExpectedCache,
    LayerTables,
    Step,
    as_lists,
    plan_by_kernel,
)

PLANNERS = {"op": plan_cache, "kernel": plan_by_kernel}
planners = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
CPU = torch.device("cpu")
POLICIES = ["lru", "lfu", "adaptive"]


def assert_equal_streams(
    planner: Callable[..., CachePlanTensors],
    experts: int,
    slots: int,
    steps: Sequence[Step],
    *,
    index_dtype: torch.dtype = torch.int64,
    start: int = 0,
    device: torch.device = DEVICE,
    **policy: Any,
) -> ExpectedCache:
    """Drive both with the same steps; equal results and tables after each."""
    expected = ExpectedCache(experts, slots, start=start, **policy)
    tables = LayerTables(experts, slots, start=start, device=device)
    for step in steps:
        ids = torch.tensor(step.ids, dtype=index_dtype, device=device)
        plan = planner(ids, tables.layer, **policy, **step.options(device))
        assert as_lists(plan) == expected.plan(step), step
        assert as_lists(tables.layer) == expected.tables(), step
    tables.assert_others_untouched()
    return expected


@st.composite
def streams(draw: st.DrawFn, max_steps: int) -> dict[str, Any]:
    """E, S between K and E, a policy and steps; few experts, so that ties and evictions happen."""
    top_k = draw(st.integers(1, 4))
    experts = draw(st.integers(top_k, 12))
    slots = draw(st.one_of(st.just(top_k), st.just(experts), st.integers(top_k, experts)))
    steps = []
    for _ in range(draw(st.integers(1, max_steps))):
        tokens = draw(st.sampled_from([1, 1, 2, 3, 6]))
        row = st.lists(st.integers(-1, experts - 1), min_size=top_k, max_size=top_k)
        speculative = draw(st.booleans())
        steps.append(
            Step(
                ids=draw(st.lists(row, min_size=tokens, max_size=tokens)),
                speculative=speculative,
                max_fills=draw(st.integers(0, 3)) if speculative else MAX_CHOICES,
                by_tensor=speculative and draw(st.booleans()),
                spare=draw(st.integers(0, 4)),
            )
        )
    return {
        "experts": experts,
        "slots": slots,
        "steps": steps,
        "policy": draw(st.sampled_from(POLICIES)),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }


@settings(max_examples=150, deadline=None)
@given(streams(max_steps=20))
def test_cpu_op_decides_as_the_python_policy(stream: dict[str, Any]) -> None:
    assert_equal_streams(plan_cache, device=CPU, **stream)


@settings(max_examples=40, deadline=None)
@given(streams(max_steps=10))
def test_kernel_decides_as_the_python_policy(stream: dict[str, Any]) -> None:
    assert_equal_streams(plan_by_kernel, **stream)


@planners
@pytest.mark.parametrize("speculative", [False, True])
def test_the_id_after_the_last_is_another_ranks(planner: Any, speculative: bool) -> None:
    """It is neither looked up nor fetched, counted, judged or remembered."""
    tables = [LayerTables(5, 3, device=DEVICE) for _ in range(2)]
    for ids in ([[5, 1], [0, 5]], [[5, 5]], [[5, 0], [3, 5]], [[2, 5]]):
        rows = torch.tensor(ids, device=DEVICE)
        plans = [
            planner(chosen, each.layer, policy="adaptive", speculative=speculative)
            for chosen, each in zip((rows, torch.where(rows == 5, -1, rows)), tables, strict=True)
        ]
        assert as_lists(plans[0]) == as_lists(plans[1])
        assert as_lists(tables[0].layer) == as_lists(tables[1].layer)
        foreign = rows == 5
        assert bool((plans[0].present[foreign] == -1).all())
        assert bool((plans[0].late[foreign] == -1).all())


def random_steps(
    count: int, *, experts: int, tokens: int, top_k: int, distinct: bool = True
) -> list[Step]:
    steps = []
    for index in range(count):
        if distinct:
            rows = [torch.randperm(experts)[:top_k].tolist() for _ in range(tokens)]
        else:
            rows = torch.randint(0, experts, (tokens, top_k)).tolist()
        steps.append(Step(ids=rows, spare=index % 4, speculative=index % 3 == 1))
    return steps


SIZES = {
    "one_expert": (1, 1, 1, 1),
    "s_and_k_are_e": (5, 5, 1, 5),
    "s_is_k": (7, 3, 3, 3),
    "largest": (512, 512, 16, 16),
    "more_than_slots": (512, 40, 16, 10),
    "odd": (300, 17, 1, 8),
}
# They take long in the interpreter: fast with one policy each, and `odd` with all.
LARGE = {"largest": "adaptive", "more_than_slots": "lru"}


@planners
@pytest.mark.parametrize(
    ("experts", "slots", "tokens", "top_k", "policy"),
    [
        pytest.param(
            *sizes,
            policy,
            id=f"{name}-{policy}",
            marks=() if LARGE.get(name, policy) == policy else pytest.mark.slow,
        )
        for name, sizes in SIZES.items()
        for policy in POLICIES
    ],
)
def test_sizes(
    planner: Callable[..., CachePlanTensors],
    policy: str,
    experts: int,
    slots: int,
    tokens: int,
    top_k: int,
) -> None:
    steps = random_steps(4, experts=experts, tokens=tokens, top_k=top_k)
    assert_equal_streams(planner, experts, slots, steps, policy=policy)


@planners
@pytest.mark.parametrize("policy", POLICIES)
def test_old_caches_keep_their_order(planner: Callable[..., CachePlanTensors], policy: str) -> None:
    """Plans beyond 32 bits are compared in full."""
    steps = random_steps(12, experts=9, tokens=1, top_k=2)
    assert_equal_streams(planner, 9, 4, steps, policy=policy, start=2**40 - 5)


@planners
def test_adaptive_follows_another_candidate(planner: Callable[..., CachePlanTensors]) -> None:
    """Runs of steps with the same few experts: counts hold on to them, recency does not."""
    groups = [torch.randperm(12)[:3].tolist() for _ in range(12)]
    steps = [Step(ids=[[g[i % 3], g[(i + 1) % 3]]]) for g in groups for i in range(6)]
    expected = assert_equal_streams(planner, 12, 4, steps, policy="adaptive")
    assert expected.cache.scores[0].candidate == RECENCY


@planners
def test_what_is_worth_least_goes_to_a_spare_place(
    planner: Callable[..., CachePlanTensors],
) -> None:
    """Two slots and one spare place: the strangers 2, 3 and 4 lack what 0 and 1 have."""
    steps = [
        *[Step(ids=[[0, 1]], spare=1)] * 6,
        Step(ids=[[2, 0]], spare=1),
        Step(ids=[[3, 4]], spare=1),
        # Guesses have no use for it.
        Step(ids=[[2]], spare=1, speculative=True),
    ]
    expected = assert_equal_streams(planner, 6, 2, steps, policy="adaptive")
    assert expected.counters["bypassed"] == 2 and expected.counters["evicted"] == 2
    assert expected.cache.slot(0, 2) >= 0 and expected.cache.slot(0, 3) < 0


@planners
@pytest.mark.parametrize("policy", POLICIES)
def test_slots_out_of_use_stay_so(planner: Callable[..., CachePlanTensors], policy: str) -> None:
    """A benchmark limits an arm's slots so; whoever took them would measure a larger cache."""
    tables = LayerTables(9, 6).layer
    tables.expert_of[3:] = 9
    for step in random_steps(12, experts=9, tokens=1, top_k=2):
        planner(
            torch.tensor(step.ids, device=DEVICE), tables, policy=policy, **step.options(DEVICE)
        )
    assert tables.expert_of[3:].tolist() == [9, 9, 9]
    assert sum(slot >= 0 for slot in tables.slot_of.tolist()) == 3


@planners
def test_pending_slots_are_late_and_stay(planner: Callable[..., CachePlanTensors]) -> None:
    steps = [
        Step(ids=[[0, 1]]),
        Step(ids=[[2]], speculative=True),
        Step(ids=[[3]], speculative=True),
        # Slots 0 and 1 went to the guesses 2 and 3: 2 comes late, 4 finds no slot that may go.
        Step(ids=[[2, 4]]),
        # 3 was a wrong guess, and leaves now.
        Step(ids=[[5, 2]]),
    ]
    expected = assert_equal_streams(planner, 6, 2, steps, policy="lru")
    assert expected.counters == {
        "steps": 3,
        "hits": 2,
        "late_prefetches": 1,
        "misses": 4,
        "bypassed": 1,
        "evicted": 3,
        "prefetches": 2,
        "useful_prefetches": 1,
        "wasted_prefetches": 1,
    }


@planners
def test_results_are_contiguous_int32(planner: Callable[..., CachePlanTensors]) -> None:
    ids = torch.tensor([[3, 1, 3], [1, -1, 0]], device=DEVICE)
    plan = planner(ids, LayerTables(4, 3).layer, policy="lru")
    shapes = [tuple(tensor.shape) for tensor in plan]
    assert shapes == [(2, 3), (2, 3), (4,), (4,), (1,)]
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in plan)
    assert plan.late.tolist() == [[0, 1, 0], [1, -1, 2]]
    assert plan.fill_experts.tolist() == [3, 1, 0, -1]


def test_kernel_counts_unknown_experts_as_none() -> None:
    """The device cannot refuse them, but must not write beyond its tables."""
    tables = LayerTables(4, 2)
    ids = torch.tensor([[4, 1, 2**33 + 1, -5]], device=DEVICE)
    plan = plan_by_kernel(ids, tables.layer, policy="lru")
    assert plan.late.tolist() == [[-1, 0, -1, -1]]
    assert plan.fill_experts.tolist() == [1, -1, -1, -1]
    assert tables.layer.slot_of.tolist() == [-1, 0, -1, -1]
    tables.assert_others_untouched()


def test_op_passes_opcheck() -> None:
    op = torch.ops.specmoe_kernels.plan_cache.default
    ids = torch.tensor([[3, 1], [1, 0]], device=DEVICE)
    for policy, speculative in (("lru", False), ("lfu", True)):
        options = {"policy": policy, "speculative": speculative}
        torch.library.opcheck(op, (ids, *LayerTables(5, 3).layer), options)


def test_op_compiles_into_one_graph() -> None:
    def two_plans(ids: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tables = CacheTables(*(row[1] for row in rows))
        guess = plan_cache(ids, tables, policy="lru", speculative=True)
        return guess.late, plan_cache(ids, tables, policy="lru").late

    ids = torch.tensor([[3, 1]], device=DEVICE)
    eager, compiled = LayerTables(5, 3), LayerTables(5, 3)
    expected = two_plans(ids, *eager.all)
    results = torch.compile(two_plans, fullgraph=True)(ids, *compiled.all)
    assert [result.tolist() for result in results] == [result.tolist() for result in expected]
    assert as_lists(compiled.all) == as_lists(eager.all)


def _spare(places: int, first: int) -> dict[str, int]:
    return {"spare": places, "spare_from": first}


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    ids = torch.tensor([[3, 1]], device=DEVICE)
    good = LayerTables(5, 3).layer
    wide = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    attempts: list[tuple[type[Exception], str, Any, CacheTables, dict[str, Any]]] = [
        (TypeError, "ids is float32, expected int64 or int32", ids.float(), good, {}),
        (ValueError, "ids is (2,), expected [T, K]", ids[0], good, {}),
        (ValueError, "ids is not contiguous", ids.repeat(2, 2)[:, ::2], good, {}),
        (ValueError, "ids has 0 choices, expected 1 to 256", ids[:0], good, {}),
        (ValueError, "ids has 257 choices", ids.new_zeros(257, 1), good, {}),
        (TypeError, "slot_of is int64", ids, good._replace(slot_of=good.slot_of.long()), {}),
        (ValueError, "scores is (3, 5)", ids, good._replace(scores=good.scores[1:]), {}),
        (ValueError, "regret is (4,)", ids, good._replace(regret=good.regret[1:]), {}),
        (ValueError, "pending is not contiguous", ids, good._replace(pending=wide[:, 0]), {}),
        (TypeError, "clock is int32", ids, good._replace(clock=good.clock.int()), {}),
        (
            ValueError,
            f"counters is (3,), expected [{len(COUNTERS)}]",
            ids,
            good._replace(counters=good.counters[:3]),
            {},
        ),
        (ValueError, "slot_of has 513 entries", ids, LayerTables(513, 3).layer, {}),
        (ValueError, "expert_of has 513 entries", ids, LayerTables(5, 513).layer, {}),
        (ValueError, "policy is 'fifo', expected one of 'lru'", ids, good, {"policy": "fifo"}),
        (ValueError, "max_fills is 1, expected 0 to 256", ids, good, {"max_fills": 1}),
        (
            ValueError,
            "max_fills is -1, expected 0 to 256",
            ids,
            good,
            {"max_fills": -1, "speculative": True},
        ),
        (
            TypeError,
            "fill_limit is int64, expected int32",
            ids,
            good,
            {"fill_limit": torch.ones(1, dtype=torch.int64, device=DEVICE), "speculative": True},
        ),
        (
            ValueError,
            "fill_limit is given, expected None if the plan is not speculative",
            ids,
            good,
            {"fill_limit": torch.ones(1, dtype=torch.int32, device=DEVICE)},
        ),
        (ValueError, "spare is 1 and spare_from 2, expected", ids, good, _spare(1, 2)),
        (ValueError, "spare is -1 and spare_from 9, expected", ids, good, _spare(-1, 9)),
    ]
    for error, message, choices, tables, options in attempts:
        with pytest.raises(error, match=re.escape(message)) as caught:
            plan_cache(choices, tables, **{"policy": "lru", **options})
        assert "\n" not in str(caught.value)


def test_cpu_op_refuses_unknown_experts() -> None:
    with pytest.raises(ValueError, match=re.escape("expert 6, but slot_of has 5 experts")):
        plan_cache(torch.tensor([[6]]), LayerTables(5, 3, device=CPU).layer, policy="lru")
