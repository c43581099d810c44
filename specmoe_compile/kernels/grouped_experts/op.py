"""Ops `run_grouped_experts_` and `reduce_choices`: experts of many tokens, and the sum over K.

A layer whose experts pass through the bank in several parts calls `run_grouped_experts_` once per
part, each time with the slots of that part, and `reduce_choices` at the end.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import FLOAT_DTYPES, check_tensor, require_triton
from specmoe_compile.kernels.common_torch import (
    BANK_SCHEMA,
    FORM_SCHEMA,
    LIBRARY,
    bank_and_form,
    check_experts,
    compute_choices,
    implement,
)
from specmoe_compile.kernels.common_torch import reduce_choices as reduce_choices_torch
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm

LIBRARY.define(
    f"run_grouped_experts_(Tensor(a!) y, Tensor x, Tensor slots, {BANK_SCHEMA}, {FORM_SCHEMA})"
    " -> ()"
)
LIBRARY.define("reduce_choices(Tensor y, Tensor weights) -> Tensor")


def run_grouped_experts_(
    y: Tensor, x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm
) -> Tensor:
    """Write the unweighted output of each choice that has a slot: y[t, k] = expert(x[t]).

    Never waits for the device. A row's bits do not depend on which other choices have a slot.

    Args:
        y: [T, K, H], dtype of `x`, contiguous; rows of choices without a slot stay as they are.
        x: [T, H] float32, bfloat16 or float16, contiguous.
        slots: [T, K] int32 or int64, contiguous: where in the bank, -1 for not in this part.
            Values are trusted on CUDA.
        bank: the weights, plain ones of the dtype of `x`.

    Returns:
        `y`.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.
        SpecMoEError: CUDA tensors without Triton.
    """
    torch.ops.specmoe_kernels.run_grouped_experts_(y, x, slots, *bank, *form.as_args())
    return y


def reduce_choices(y: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over K: out[t] = sum over k of weights[t, k] * y[t, k].

    Args:
        y: [T, K, H] float, contiguous.
        weights: [T, K] float, contiguous.

    Returns:
        [T, H], dtype of `y`. Sums in fp32; repeated runs give the same bits.

    Raises:
        TypeError, ValueError, SpecMoEError: see `run_grouped_experts_`.
    """
    return torch.ops.specmoe_kernels.reduce_choices(y, weights)


def _check_grouped(
    y: Tensor, x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm
) -> tuple[int, int]:
    op = "run_grouped_experts_"
    hidden, inner = check_experts(op, x, slots, bank, form)
    check_tensor(op, "y", y, (*slots.shape, hidden), (x.dtype,), like=x)
    return hidden, inner


def _grouped_fake(y: Tensor, x: Tensor, slots: Tensor, *rest: Any) -> None:
    _check_grouped(y, x, slots, *bank_and_form(rest))


def _grouped_cpu(y: Tensor, x: Tensor, slots: Tensor, *rest: Any) -> None:
    bank, form = bank_and_form(rest)
    _check_grouped(y, x, slots, bank, form)
    compute_choices(y, x, slots, bank, form)


def _grouped_cuda(y: Tensor, x: Tensor, slots: Tensor, *rest: Any) -> None:
    require_triton("run_grouped_experts_")
    from specmoe_compile.kernels.grouped_experts.config import block_m
    from specmoe_compile.kernels.grouped_experts.launch import launch_grouped
    from specmoe_compile.kernels.grouped_experts.packed import run_packed
    from specmoe_compile.kernels.grouped_experts.plan import plan_tiles

    bank, form = bank_and_form(rest)
    _, inner = _check_grouped(y, x, slots, bank, form)
    num_slots = bank.up.shape[0]
    if slots.numel() == 0 or num_slots == 0:
        return
    with torch.cuda.device(x.device):
        if not form.format.is_plain:
            run_packed(y, x, slots, bank, form)
            return
        rows = block_m(slots.numel(), num_slots, x.element_size())
        plan = plan_tiles(slots, num_slots, rows)
        intermediate = x.new_empty((slots.numel(), inner))
        launch_grouped(x, bank, form, plan, rows, intermediate, y)


def _check_reduce(y: Tensor, weights: Tensor) -> None:
    check_tensor("reduce_choices", "y", y, ("T", "K", "H"), FLOAT_DTYPES)
    shape = (y.shape[0], y.shape[1])
    check_tensor("reduce_choices", "weights", weights, shape, FLOAT_DTYPES, like=y)


def _reduce_fake(y: Tensor, weights: Tensor) -> Tensor:
    _check_reduce(y, weights)
    return y.new_empty((y.shape[0], y.shape[2]))


def _reduce_cpu(y: Tensor, weights: Tensor) -> Tensor:
    _check_reduce(y, weights)
    return reduce_choices_torch(y, weights, y.dtype)


def _reduce_cuda(y: Tensor, weights: Tensor) -> Tensor:
    require_triton("reduce_choices")
    from specmoe_compile.kernels.blend_default_vectors.kernel import launch_weighted_sum

    _check_reduce(y, weights)
    out = y.new_empty((y.shape[0], y.shape[2]))
    if y.numel() == 0:
        return out.zero_()
    with torch.cuda.device(y.device):
        launch_weighted_sum(y, None, weights, out)
    return out


implement("run_grouped_experts_", cpu=_grouped_cpu, cuda=_grouped_cuda, fake=_grouped_fake)
implement("reduce_choices", cpu=_reduce_cpu, cuda=_reduce_cuda, fake=_reduce_fake)
