"""Completing a layer: late experts, skipped experts, and the bits of the one-shot execution."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.correct_experts.kernel import launch_correct
from specmoe_compile.kernels.correct_experts.op import correct_experts
from specmoe_compile.kernels.correct_experts.reference import correct_experts_reference
from specmoe_compile.kernels.expert_mlp.op import run_experts_decode, run_resident_experts
from tests.kernels.expert_cases import (
    DEVICE,
    FORMS,
    TOLERANCES,
    Case,
    make_case,
    nan_like,
    run_kernels,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPERTS = 7


def split(case: Case, late: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of the resident choices and of the late ones; `late` is bool [T, K]."""
    return case.slots.masked_fill(late, -1), case.slots.masked_fill(~late, -1)


def make_states(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every choice late, skipped or computed before, at random.

    Returns:
        partial [T, K, H] (NaN where it must not be read), slots and skipped [T, K], default
        vectors [E, H].
    """
    state = torch.randint(0, 3, case.slots.shape, device=DEVICE)
    partial = torch.randn(*case.slots.shape, case.x.shape[1], device=DEVICE).to(case.x.dtype)
    partial[state != 2] = float("nan")
    ids = torch.randint(0, EXPERTS, case.slots.shape, device=DEVICE).to(case.slots.dtype)
    return (
        partial,
        case.slots.masked_fill(state != 0, -1),
        ids.masked_fill(state != 1, -1),
        torch.randn(EXPERTS, case.x.shape[1], device=DEVICE),
    )


def run_kernel(
    case: Case,
    partial: Tensor,
    slots: Tensor,
    skipped: Tensor | None = None,
    default_vectors: Tensor | None = None,
) -> Tensor:
    """`correct_experts` by its launches, on NaN-filled buffers."""
    tokens, top_k = slots.shape
    hidden, inner = case.bank.sizes(case.form)
    intermediate = nan_like(tokens, top_k, inner, dtype=case.x.dtype)
    out = nan_like(tokens, hidden, dtype=case.x.dtype)
    launch_correct(
        partial,
        case.x,
        slots,
        case.weights,
        skipped,
        default_vectors,
        case.bank,
        case.form,
        intermediate,
        out,
    )
    return out


# All sizes in float32, and each other dtype in one half of them; the rest is slow.
_OTHER_DTYPES = {
    torch.bfloat16: ("plain", "k_is_e", "several_tiles"),
    torch.float16: ("one_token", "one_expert"),
}


def _sizes_and_dtypes(sizes: dict[str, dict[str, int]]) -> list[Any]:
    return [
        pytest.param(
            size,
            dtype,
            id=f"{name}-{dtype}",
            marks=() if name in _OTHER_DTYPES.get(dtype, sizes) else pytest.mark.slow,
        )
        for name, size in sizes.items()
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    _sizes_and_dtypes(
        {
            "plain": {},
            "one_token": {"tokens": 1, "hidden": 33, "inner": 17, "top_k": 3},
            "k_is_e": {"tokens": 4, "slots": 3, "top_k": 3},
            "several_tiles": {"tokens": 2, "hidden": 300, "inner": 270},
            "one_expert": {"tokens": 5, "slots": 1, "top_k": 1},
        }
    ),
)
@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_kernel_matches_the_reference(form: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    case = make_case(FORMS[form], bias=form == "gpt_oss", dtype=dtype, **sizes)
    states = make_states(case)
    out = run_kernel(case, *states)
    partial, slots, skipped, defaults = states
    expected = correct_experts_reference(
        partial, case.x, slots, case.weights, skipped, defaults, case.bank, case.form
    )
    torch.testing.assert_close(out, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["silu", "gpt_oss", "no_gate_relu2"])
def test_late_experts_do_not_change_a_bit(form: str, dtype: torch.dtype) -> None:
    sizes = {"tokens": 1, "top_k": 3, "hidden": 12, "inner": 8}
    case = make_case(FORMS[form], bias=True, dtype=dtype, **sizes)
    _, expected = run_kernels(case)
    for bits in itertools.product([False, True], repeat=3):
        late = torch.tensor([bits], device=DEVICE)
        resident, missing = split(case, late)
        partial, _ = run_kernels(Case(**{**vars(case), "slots": resident}))
        partial[late] = float("nan")
        assert torch.equal(run_kernel(case, partial, missing), expected), bits


def test_op_gives_the_bits_of_the_one_shot_op() -> None:
    case = make_case(FORMS["silu"], tokens=8, top_k=3, dtype=torch.bfloat16)
    expected = run_experts_decode(case.x, case.slots, case.weights, case.bank, case.form)
    for late_slots in ([], [1], [0, 3], [0, 1, 2, 3, 4]):
        late = torch.isin(case.slots, torch.tensor(late_slots, device=DEVICE))
        resident, missing = split(case, late)
        partial = run_resident_experts(case.x, resident, case.weights, case.bank, case.form)
        out = correct_experts(partial, case.x, missing, case.weights, case.bank, case.form)
        assert torch.equal(out, expected), late_slots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_op_matches_the_reference(form: str, dtype: torch.dtype) -> None:
    case = make_case(FORMS[form], tokens=9, bias=True, dtype=dtype, index_dtype=torch.int64)
    partial, slots, skipped, defaults = make_states(case)
    out = correct_experts(
        partial,
        case.x,
        slots,
        case.weights,
        case.bank,
        case.form,
        skipped=skipped,
        default_vectors=defaults,
    )
    assert out.shape == case.x.shape and out.stride() == case.x.stride()
    expected = correct_experts_reference(
        partial, case.x, slots, case.weights, skipped, defaults, case.bank, case.form
    )
    torch.testing.assert_close(out, expected, **TOLERANCES[dtype])


def op_args(case: Case) -> tuple[Any, ...]:
    partial, slots, skipped, defaults = make_states(case)
    partial = partial.nan_to_num()
    rest = (*case.bank, *case.form.as_args())
    return (partial, case.x, slots, case.weights, skipped, defaults, *rest)


def test_op_passes_opcheck() -> None:
    args = op_args(make_case(FORMS["gpt_oss"], bias=True))
    op = torch.ops.specmoe_kernels.correct_experts.default
    torch.library.opcheck(op, args)
    torch.library.opcheck(op, (*args[:4], None, None, *args[6:]))


def test_op_compiles_into_one_graph() -> None:
    args = op_args(make_case(FORMS["silu"]))
    op = torch.ops.specmoe_kernels.correct_experts
    compiled = torch.compile(lambda *inputs: op(*inputs) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(*args), op(*args) + 1, rtol=0, atol=0)


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    case = make_case(FORMS["silu"])
    partial, slots, skipped, defaults = make_states(case)
    good: dict[str, Any] = {"skipped": skipped, "default_vectors": defaults}
    attempts: list[tuple[type[Exception], str, Tensor, dict[str, Any]]] = [
        (ValueError, "partial is (3, 2, 20), expected [3, 2, 40]", partial[:, :, :20], good),
        (TypeError, "partial is float16, expected float32", partial.half(), good),
        (
            ValueError,
            "partial is not contiguous",
            partial.transpose(0, 1).contiguous().transpose(0, 1),
            {},
        ),
        (ValueError, "come together or not at all", partial, {"skipped": skipped}),
        (
            TypeError,
            "skipped is int64, expected int32",
            partial,
            good | {"skipped": skipped.long()},
        ),
        (
            TypeError,
            "default_vectors is bfloat16, expected float32",
            partial,
            good | {"default_vectors": defaults.bfloat16()},
        ),
        (
            ValueError,
            "default_vectors is (7, 39), expected [E, 40]",
            partial,
            good | {"default_vectors": defaults[:, 1:].contiguous()},
        ),
    ]
    for error, message, rows, options in attempts:
        with pytest.raises(error, match=re.escape(message)) as caught:
            correct_experts(rows, case.x, slots, case.weights, case.bank, case.form, **options)
        assert "\n" not in str(caught.value)
