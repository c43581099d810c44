"""`note_prompt` against the runtime's Python policy, alone and in front of plans."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.note_prompt.kernel import launch_note_prompt
from specmoe_compile.kernels.note_prompt.op import note_prompt
from specmoe_compile.runtime.cache.eviction import PROMPT_TOKENS
from tests.kernels.expert_cases import DEVICE
from tests.kernels.plan_cases import ExpectedCache, LayerTables, Step, as_lists, plan_by_kernel

NOTERS = {"op": note_prompt, "kernel": launch_note_prompt}
noters = pytest.mark.parametrize("noter", NOTERS.values(), ids=NOTERS)


def random_ids(tokens: int, experts: int, top_k: int, *, dtype: torch.dtype) -> Tensor:
    """Choices of tokens, some of nobody, of another rank's expert, or of one expert twice."""
    return torch.randint(-1, experts + 1, (tokens, top_k), dtype=dtype, device=DEVICE)


@noters
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("experts", "tokens", "top_k"),
    [(1, 3, 1), (7, 0, 2), (7, 1, 3), (32, 20, 4), (60, PROMPT_TOKENS + 9, 2), (300, 17, 8)],
)
def test_prompts_are_counted_as_the_python_policy_counts(
    noter: Any, experts: int, tokens: int, top_k: int, dtype: torch.dtype
) -> None:
    expected = ExpectedCache(experts, 1, start=5, policy="adaptive")
    tables = LayerTables(experts, 1, start=5)
    for _ in range(2):
        ids = random_ids(tokens, experts, top_k, dtype=dtype)
        expected.cache.note_prompt(0, ids.cpu().numpy())
        noter(ids, tables.layer.scores, tables.layer.clock)
        assert as_lists(tables.layer) == expected.tables()
    tables.assert_others_untouched()
    assert int(tables.layer.clock) == 5 + 2 * min(tokens, PROMPT_TOKENS)


@noters
def test_plans_behind_a_prompt_are_the_policy_s(noter: Any) -> None:
    expected, tables = ExpectedCache(12, 4, policy="adaptive"), LayerTables(12, 4)
    for _ in range(3):
        prompt = random_ids(20, 12, 2, dtype=torch.int64)
        expected.cache.note_prompt(0, prompt.cpu().numpy())
        noter(prompt, tables.layer.scores, tables.layer.clock)
        for _ in range(6):
            step = Step(ids=[torch.randperm(12)[:2].tolist()], spare=2)
            ids = torch.tensor(step.ids, device=DEVICE)
            plan = plan_by_kernel(ids, tables.layer, policy="adaptive", **step.options(DEVICE))
            assert as_lists(plan) == expected.plan(step)
            assert as_lists(tables.layer) == expected.tables()


def test_kernel_counts_unknown_experts_as_none() -> None:
    tables = LayerTables(4, 2)
    ids = torch.tensor([[4, 1, 2**33 + 1, -5]], device=DEVICE)
    launch_note_prompt(ids, tables.layer.scores, tables.layer.clock)
    assert tables.layer.scores.count_nonzero(dim=1).tolist() == [1, 1, 1, 1]
    tables.assert_others_untouched()


def test_op_passes_opcheck() -> None:
    layer = LayerTables(5, 3).layer
    ids = torch.tensor([[3, 1], [1, 0]], device=DEVICE)
    op = torch.ops.specmoe_kernels.note_prompt.default
    torch.library.opcheck(op, (ids, layer.scores, layer.clock))


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    ids, good = torch.tensor([[3, 1]], device=DEVICE), LayerTables(5, 3).layer
    attempts: list[tuple[type[Exception], str, Tensor, Tensor, Tensor]] = [
        (TypeError, "ids is float32, expected int64", ids.float(), good.scores, good.clock),
        (ValueError, "ids is not contiguous", ids.repeat(2, 2)[:, ::2], good.scores, good.clock),
        (ValueError, "scores is (3, 5), expected", ids, good.scores[1:], good.clock),
        (ValueError, "513 experts, expected 1 to 512", ids, wide_scores(), good.clock),
        (TypeError, "clock is int32, expected int64", ids, good.scores, good.clock.int()),
    ]
    for error, message, choices, scores, clock in attempts:
        with pytest.raises(error, match=re.escape(message)) as caught:
            note_prompt(choices, scores, clock)
        assert "\n" not in str(caught.value)


def wide_scores() -> Tensor:
    return LayerTables(513, 1).layer.scores
