"""The kernels of the expert cache on a real GPU at the sizes of real models, many times over."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.compile_spec import MODEL_SHAPES, ModelShape
from benchmarks.kernels.variants.gather_experts import record_bytes_of_shape
from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.kernels.gather_experts.reference import gather_experts_reference
from specmoe_compile.kernels.note_prompt.op import note_prompt
from specmoe_compile.kernels.plan_cache.op import plan_cache
from specmoe_compile.runtime.cache.eviction import PROMPT_TOKENS
from tests.kernels.expert_cases import DEVICE
from tests.kernels.gpu_cases import RUNS, no_synchronisation
from tests.kernels.plan_cases import ExpectedCache, LayerTables, as_lists
from tests.kernels.test_plan_cache import assert_equal_streams, random_steps

pytestmark = pytest.mark.gpu

POISON = 171


@pytest.fixture(params=MODEL_SHAPES, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return request.param


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_plans_are_the_policy_s_and_the_same_in_every_run(
    shape: ModelShape, tokens: int, policy: str
) -> None:
    experts, slots = shape.num_experts, max(shape.top_k, shape.num_experts // 4)
    steps = random_steps(8, experts=experts, tokens=tokens, top_k=shape.top_k)
    assert_equal_streams(plan_cache, experts, slots, steps, policy=policy)
    ids = [torch.tensor(step.ids, device=DEVICE) for step in steps]
    runs = [LayerTables(experts, slots) for _ in range(RUNS)]
    with no_synchronisation():
        plans = [
            [
                plan_cache(chosen, tables.layer, policy=policy, **step.options(DEVICE))
                for chosen, step in zip(ids, steps, strict=True)
            ]
            for tables in runs
        ]
    for tables, plan in zip(runs[1:], plans[1:], strict=True):
        assert as_lists(tables.layer) == as_lists(runs[0].layer)
        assert [as_lists(one) for one in plan] == [as_lists(one) for one in plans[0]]


@pytest.mark.parametrize("tokens", [17, PROMPT_TOKENS + 60])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prompts_are_counted_as_the_policy_counts_in_every_run(
    shape: ModelShape, tokens: int, dtype: torch.dtype
) -> None:
    experts, slots = shape.num_experts, max(shape.top_k, shape.num_experts // 4)
    rows = [torch.randperm(experts)[: shape.top_k].tolist() for _ in range(tokens)]
    prompt = torch.tensor(rows, dtype=dtype, device=DEVICE)
    steps = random_steps(8, experts=experts, tokens=1, top_k=shape.top_k)
    ids = [torch.tensor(step.ids, device=DEVICE) for step in steps]
    expected = ExpectedCache(experts, slots, policy="adaptive")
    runs = [LayerTables(experts, slots) for _ in range(RUNS)]
    with no_synchronisation():
        for tables in runs:
            note_prompt(prompt, tables.layer.scores, tables.layer.clock)
    expected.cache.note_prompt(0, prompt.cpu().numpy())
    for tables in runs:
        assert as_lists(tables.layer) == expected.tables()
        tables.assert_others_untouched()
    for chosen, step in zip(ids, steps, strict=True):
        plan = plan_cache(chosen, runs[0].layer, policy="adaptive", **step.options(DEVICE))
        assert as_lists(plan) == expected.plan(step)
    assert as_lists(runs[0].layer) == expected.tables()


@pytest.mark.parametrize("programs", [8, 32, 128])
def test_records_arrive_whole_in_every_run(shape: ModelShape, programs: int) -> None:
    experts, size = shape.top_k + 2, record_bytes_of_shape(shape)
    source = torch.randint(0, 256, (experts, size), dtype=torch.uint8)
    chosen = torch.randperm(experts)[: shape.top_k].int()
    places = torch.randperm(experts)[: shape.top_k].int()
    count = torch.tensor([shape.top_k - 1], dtype=torch.int32)
    expected = torch.full((experts, size), POISON, dtype=torch.uint8)
    gather_experts_reference([source], [expected], chosen, places, count)
    on_device = expected.to(DEVICE)
    pinned = source.pin_memory()
    lists = [values.to(DEVICE) for values in (chosen, places, count)]
    slots = torch.empty_like(on_device)
    for _ in range(RUNS):
        slots.fill_(POISON)
        with no_synchronisation():
            gather_experts([pinned], [slots], *lists, programs=programs)
        assert torch.equal(slots, on_device)
