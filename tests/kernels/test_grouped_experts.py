"""Grouped execution against one product per choice in plain torch."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.grouped_experts.launch import launch_grouped
from specmoe_compile.kernels.grouped_experts.op import reduce_choices, run_grouped_experts_
from specmoe_compile.kernels.grouped_experts.plan import max_tiles, plan_tiles
from specmoe_compile.kernels.grouped_experts.reference import (
    reduce_choices_reference,
    run_grouped_experts_reference,
)
from specmoe_compile.runtime.experts.form import ExpertBank
from tests.kernels.expert_cases import (
    DEVICE,
    FORMS,
    TOLERANCES,
    Case,
    form_and_dtype,
    make_case,
    nan_like,
)

BLOCK_M = 16


def run_kernel(case: Case, y: Tensor) -> Tensor:
    """Both launches into `y`, with NaN in the scratch memory."""
    inner = case.bank.sizes(case.form)[1]
    plan = plan_tiles(case.slots, case.bank.up.shape[0], BLOCK_M)
    intermediate = nan_like(case.slots.numel(), inner, dtype=case.x.dtype)
    launch_grouped(case.x, case.bank, case.form, plan, BLOCK_M, intermediate, y)
    return y


def assert_matches_reference(case: Case) -> None:
    y = nan_like(*case.slots.shape, case.x.shape[1], dtype=case.x.dtype)
    expected = run_grouped_experts_reference(y, case.x, case.slots, case.bank, case.form)
    torch.testing.assert_close(
        run_kernel(case, y), expected, equal_nan=True, **TOLERANCES[case.x.dtype]
    )


@form_and_dtype()
def test_kernels_match_the_reference(form: Any, dtype: torch.dtype) -> None:
    assert_matches_reference(make_case(form, tokens=30, dtype=dtype, bias=True))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "hidden": 33, "inner": 17},
        {"tokens": 70, "hidden": 7, "inner": 3, "top_k": 3},
        {"tokens": 20, "hidden": 150, "inner": 70},
        {"tokens": 18, "slots": 3, "top_k": 3},
        {"tokens": 5, "slots": 40},
    ],
    ids=["one_token", "smaller_than_a_tile", "several_tiles", "k_is_e", "empty_experts"],
)
@pytest.mark.parametrize("form", ["silu", "gpt_oss", "no_gate_transposed"])
def test_kernels_take_odd_sizes(form: str, sizes: dict[str, int]) -> None:
    assert_matches_reference(make_case(FORMS[form], **sizes))


def test_all_tokens_on_one_expert() -> None:
    case = make_case(FORMS["silu"], tokens=50, top_k=1)
    assert_matches_reference(dataclasses.replace(case, slots=torch.full_like(case.slots, 3)))


def test_rows_without_a_slot_stay() -> None:
    case = make_case(FORMS["silu"], tokens=20)
    case.slots[3:12, 1] = -1
    assert_matches_reference(case)


def test_nothing_happens_when_no_choice_has_a_slot() -> None:
    case = make_case(FORMS["silu"], tokens=4)
    case.slots.fill_(-1)
    assert run_kernel(case, nan_like(4, 2, 40, dtype=torch.float32)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_give_the_bits_of_one_call(dtype: torch.dtype) -> None:
    case = make_case(FORMS["silu"], tokens=40, dtype=dtype)
    at_once = run_kernel(case, nan_like(40, 2, 40, dtype=dtype))
    in_parts = nan_like(40, 2, 40, dtype=dtype)
    for part in ([0, 3], [1], [2, 4]):
        absent = ~torch.isin(case.slots, torch.tensor(part, device=DEVICE))
        run_kernel(dataclasses.replace(case, slots=case.slots.masked_fill(absent, -1)), in_parts)
    assert torch.equal(in_parts, at_once)


@pytest.mark.parametrize("block_m", [1, 16, 64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_plan_covers_each_choice_once(index_dtype: torch.dtype, block_m: int) -> None:
    for num_slots in (1, 2, 9):
        slots = torch.randint(-1, num_slots, (60, 3), dtype=index_dtype, device=DEVICE)
        slots[slots == num_slots // 2] = 0
        plan = plan_tiles(slots, num_slots, block_m)
        assert plan.slot.numel() == max_tiles(180, num_slots, block_m)
        seen: list[int] = []
        columns = zip(*(column.tolist() for column in plan[1:]), strict=True)
        for tile, (slot, start, end, first, count) in enumerate(columns):
            if slot >= 0:
                assert 0 < end - start <= block_m
                assert plan.slot[first : first + count].tolist() == [slot] * count
                assert first <= tile < first + count
                choices = plan.order[start:end].tolist()
                assert all(int(slots.view(-1)[choice]) == slot for choice in choices)
                seen.extend(choices)
        assert sorted(seen) == (slots.view(-1) >= 0).nonzero().squeeze(1).tolist()


@form_and_dtype(("silu", "gpt_oss", "no_gate_relu2"))
def test_ops_match_the_reference(form: Any, dtype: torch.dtype) -> None:
    case = make_case(form, tokens=33, dtype=dtype, bias=True, index_dtype=torch.int64)
    case.slots[5, 0] = -1
    y = torch.full((33, 2, 40), 3.0, dtype=dtype, device=DEVICE)
    expected = run_grouped_experts_reference(y, case.x, case.slots, case.bank, case.form)
    assert run_grouped_experts_(y, case.x, case.slots, case.bank, case.form) is y
    torch.testing.assert_close(y, expected, **TOLERANCES[dtype])
    out = reduce_choices(y, case.weights)
    assert out.shape == (33, 40) and out.is_contiguous()
    torch.testing.assert_close(out, reduce_choices_reference(y, case.weights), **TOLERANCES[dtype])


def test_ops_pass_opcheck() -> None:
    case = make_case(FORMS["gpt_oss"], tokens=6, bias=True)
    y = torch.zeros(6, 2, 40, device=DEVICE)
    args = (y, case.x, case.slots, *case.bank, *case.form.as_args())
    torch.library.opcheck(torch.ops.specmoe_kernels.run_grouped_experts_.default, args)
    torch.library.opcheck(torch.ops.specmoe_kernels.reduce_choices.default, (y, case.weights))


def test_ops_compile_into_one_graph() -> None:
    case = make_case(FORMS["silu"], tokens=20)

    def layer(x: Tensor, slots: Tensor, weights: Tensor, bank: ExpertBank) -> Tensor:
        y = x.new_zeros((*slots.shape, x.shape[1]))
        return reduce_choices(run_grouped_experts_(y, x, slots, bank, case.form), weights)

    args = (case.x, case.slots, case.weights, case.bank)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(*args), layer(*args), rtol=0, atol=0)


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    case = make_case(FORMS["silu"])
    y = torch.zeros(3, 2, 40, device=DEVICE)
    attempts: list[tuple[type[Exception], str, Tensor, Case]] = [
        (TypeError, "y is float64, expected float32", y.double(), case),
        (ValueError, "y is (3, 2, 39), expected [3, 2, 40]", y[:, :, 1:], case),
        (ValueError, "y is not contiguous", y.transpose(0, 1).contiguous().transpose(0, 1), case),
        (
            TypeError,
            "slots is float32, expected int64 or int32",
            y,
            dataclasses.replace(case, slots=case.slots.float()),
        ),
    ]
    for error, message, rows, attempt in attempts:
        with pytest.raises(error, match=re.escape(message)) as caught:
            run_grouped_experts_(rows, attempt.x, attempt.slots, attempt.bank, attempt.form)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape("weights is (2, 2), expected [3, 2]")):
        reduce_choices(y, case.weights[1:])
    with pytest.raises(ValueError, match="y is not contiguous"):
        reduce_choices(y.transpose(1, 2), case.weights)
