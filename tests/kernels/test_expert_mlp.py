"""Decode kernels against one product per choice in plain torch.

Kernels run on the GPU if there is one, else in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.op import run_experts_decode, run_resident_experts
from specmoe_compile.kernels.expert_mlp.reference import (
    run_experts_decode_reference,
    run_resident_experts_reference,
)
from specmoe_compile.runtime.experts.form import ExpertBank
from tests.kernels.expert_cases import (
    DEVICE,
    FORMS,
    TOLERANCES,
    Case,
    form_and_dtype,
    make_case,
    run_kernels,
)


def assert_matches_reference(case: Case) -> None:
    y, out = run_kernels(case)
    expected_y = run_resident_experts_reference(case.x, case.slots, case.bank, case.form)
    expected = run_experts_decode_reference(case.x, case.slots, case.weights, case.bank, case.form)
    torch.testing.assert_close(y, expected_y, **TOLERANCES[case.x.dtype])
    torch.testing.assert_close(out, expected, **TOLERANCES[case.x.dtype])


@form_and_dtype()
def test_kernels_match_the_reference(form: Any, dtype: torch.dtype) -> None:
    """With biases in every dtype, and without in float32: adding them knows no dtype."""
    assert_matches_reference(make_case(form, dtype=dtype, bias=True))
    if dtype == torch.float32:
        assert_matches_reference(make_case(form, dtype=dtype, bias=False))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "hidden": 33, "inner": 17},
        {"tokens": 5, "hidden": 7, "inner": 3, "top_k": 3},
        {"tokens": 2, "hidden": 300, "inner": 150},
        {"tokens": 16, "hidden": 16, "inner": 8, "top_k": 1},
        {"tokens": 2, "hidden": 16, "inner": 8, "top_k": 5},
    ],
    ids=["one_token", "smaller_than_a_load", "several_tiles", "sixteen_tokens", "k_is_e"],
)
@pytest.mark.parametrize("form", ["silu", "gpt_oss", "transposed"])
def test_kernels_take_odd_sizes(form: str, sizes: dict[str, int]) -> None:
    assert_matches_reference(make_case(FORMS[form], bias=form == "gpt_oss", **sizes))


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_all_tokens_on_one_expert(form: str) -> None:
    case = make_case(FORMS[form], tokens=4, top_k=1)
    assert_matches_reference(dataclasses.replace(case, slots=torch.full_like(case.slots, 3)))


def test_int64_slots_are_accepted() -> None:
    assert_matches_reference(make_case(FORMS["silu"], index_dtype=torch.int64))


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_absent_choices_count_as_zero(form: str) -> None:
    case = make_case(FORMS[form], tokens=4, bias=True)
    case.slots[0, 0] = -1
    case.slots[2] = -1
    assert_matches_reference(case)
    y, out = run_kernels(case)
    assert not y[0, 0].any() and not y[2].any() and not out[2].any()


def test_absent_choices_take_the_rows_of_partial() -> None:
    case = make_case(FORMS["silu"], tokens=4)
    case.slots[1, 1] = -1
    partial = torch.full((4, 2, 40), 7.0, device=DEVICE)
    y, out = run_kernels(case, partial=partial)
    expected = run_resident_experts_reference(case.x, case.slots, case.bank, case.form, partial)
    torch.testing.assert_close(y, expected, **TOLERANCES[torch.float32])
    assert torch.equal(y[1, 1], partial[1, 1])
    total = (expected * case.weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(out, total, **TOLERANCES[torch.float32])


def test_repeated_runs_give_the_same_bits() -> None:
    case = make_case(FORMS["silu"], tokens=4, dtype=torch.bfloat16)
    first = run_kernels(case)
    for _ in range(3):
        again = run_kernels(case)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@form_and_dtype()
def test_ops_match_the_reference(form: Any, dtype: torch.dtype) -> None:
    case = make_case(form, tokens=6, dtype=dtype, bias=True)
    case.slots[3, 1] = -1
    out = run_experts_decode(case.x, case.slots, case.weights, case.bank, form)
    assert out.shape == case.x.shape and out.stride() == case.x.stride()
    expected = run_experts_decode_reference(case.x, case.slots, case.weights, case.bank, form)
    torch.testing.assert_close(out, expected, **TOLERANCES[dtype])
    y = run_resident_experts(case.x, case.slots, case.weights, case.bank, form)
    expected_y = run_resident_experts_reference(case.x, case.slots, case.bank, form)
    torch.testing.assert_close(y, expected_y, **TOLERANCES[dtype])


def test_op_merges_partial_rows_without_changing_them() -> None:
    case = make_case(FORMS["silu"], tokens=4)
    case.slots[1, 1] = -1
    partial = torch.full((4, 2, 40), 7.0, device=DEVICE)
    y = run_resident_experts(case.x, case.slots, case.weights, case.bank, case.form, partial)
    assert torch.equal(y[1, 1], partial[1, 1])
    assert (partial == 7.0).all()


def op_args(case: Case) -> tuple[Any, ...]:
    return (case.x, case.slots, case.weights, *case.bank, *case.form.as_args())


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_ops_pass_opcheck(form: str) -> None:
    case = make_case(FORMS[form], bias=True)
    args = op_args(case)
    torch.library.opcheck(torch.ops.specmoe_kernels.run_experts_decode.default, args)
    partial = torch.zeros(3, 2, 40, device=DEVICE)
    for rows in (None, partial):
        torch.library.opcheck(
            torch.ops.specmoe_kernels.run_resident_experts.default, (*args[:3], rows, *args[3:])
        )


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_ops_compile_into_one_graph(form: str) -> None:
    case = make_case(FORMS[form], bias=True)

    def layer(x: Tensor, slots: Tensor, weights: Tensor, bank: ExpertBank) -> Tensor:
        return run_experts_decode(x, slots, weights, bank, case.form) * 2

    compiled = torch.compile(layer, fullgraph=True)
    args = (case.x, case.slots, case.weights, case.bank)
    torch.testing.assert_close(compiled(*args), layer(*args), rtol=0, atol=0)


def wrong(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("op", [run_experts_decode, run_resident_experts])
def test_wrong_arguments_are_refused_with_one_sentence(op: Any) -> None:
    case = make_case(FORMS["silu"])
    bank = case.bank
    attempts: list[tuple[type[Exception], str, Case]] = [
        (TypeError, "x is float64, expected", wrong(case, x=case.x.double())),
        (TypeError, "slots is float32, expected", wrong(case, slots=case.slots.float())),
        (TypeError, "weights is int32, expected", wrong(case, weights=case.slots)),
        (TypeError, "up is float32, expected bfloat16", wrong(case, x=case.x.bfloat16())),
        (ValueError, "x is (40,), expected [T, H]", wrong(case, x=case.x[0])),
        (ValueError, "slots is (2, 2), expected [3, K]", wrong(case, slots=case.slots[1:])),
        (
            ValueError,
            "weights is (3, 1), expected [3, 2]",
            wrong(case, weights=case.weights[:, :1]),
        ),
        (ValueError, "slots is not contiguous", wrong(case, slots=case.slots.t().contiguous().t())),
        (ValueError, "x is not contiguous", wrong(case, x=case.x.t().contiguous().t())),
        (
            ValueError,
            "up is (5, 46, 40), expected [S, 48, 40]",
            wrong(case, bank=bank._replace(up=bank.up[:, :46])),
        ),
        (
            ValueError,
            "each slot of down must be contiguous",
            wrong(
                case,
                bank=bank._replace(down=bank.down.transpose(1, 2).contiguous().transpose(1, 2)),
            ),
        ),
        (
            ValueError,
            "up_bias and down_bias come together or not at all",
            wrong(case, bank=bank._replace(down_bias=bank.down[:, :, 0])),
        ),
    ]
    for error, message, attempt in attempts:
        with pytest.raises(error, match=re.escape(message)) as caught:
            op(attempt.x, attempt.slots, attempt.weights, attempt.bank, attempt.form)
        assert "\n" not in str(caught.value)


def test_partial_of_another_shape_is_refused() -> None:
    case = make_case(FORMS["silu"])
    with pytest.raises(ValueError, match=re.escape("partial is (3, 2, 39), expected [3, 2, 40]")):
        run_resident_experts(
            case.x,
            case.slots,
            case.weights,
            case.bank,
            case.form,
            torch.zeros(3, 2, 39, device=DEVICE),
        )


def test_no_tokens_give_no_rows() -> None:
    case = make_case(FORMS["silu"])
    empty = wrong(case, x=case.x[:0], slots=case.slots[:0], weights=case.weights[:0])
    out = run_experts_decode(empty.x, empty.slots, empty.weights, empty.bank, empty.form)
    assert out.shape == (0, 40)
