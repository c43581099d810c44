"""Ops `run_experts_decode` and `run_resident_experts`: experts of a few tokens, by slot.

`run_experts_decode` computes a layer whose experts are all there. `run_resident_experts` computes
those that are, and keeps each choice's output for `correct_experts`.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import check_tensor, require_triton
from specmoe_compile.kernels.common_torch import (
    BANK_SCHEMA,
    FORM_SCHEMA,
    LIBRARY,
    bank_and_form,
    check_experts,
    check_routing_weights,
    compute_choices,
    implement,
    reduce_choices,
)
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm

LIBRARY.define(
    f"run_experts_decode(Tensor x, Tensor slots, Tensor weights, {BANK_SCHEMA}, {FORM_SCHEMA})"
    " -> Tensor"
)
LIBRARY.define(
    f"run_resident_experts(Tensor x, Tensor slots, Tensor weights, Tensor? partial, {BANK_SCHEMA},"
    f" {FORM_SCHEMA}) -> Tensor"
)


def run_experts_decode(
    x: Tensor, slots: Tensor, weights: Tensor, bank: ExpertBank, form: ExpertForm
) -> Tensor:
    """Weighted sum of each token's experts: out[t] = sum over k of weights[t, k] * expert(x[t]).

    Args:
        x: [T, H] float32, bfloat16 or float16, contiguous; meant for T up to 16.
        slots: [T, K] int32 or int64, contiguous: where in the bank, -1 for a choice to leave out.
            Values are trusted on CUDA.
        weights: [T, K] float, contiguous.
        bank: the weights, plain ones of the dtype of `x`.

    Returns:
        [T, H], dtype of `x`. Repeated runs give the same bits.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.
        SpecMoEError: CUDA tensors without Triton.
    """
    op = torch.ops.specmoe_kernels.run_experts_decode
    return op(x, slots, weights, *bank, *form.as_args())


def run_resident_experts(
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    partial: Tensor | None = None,
) -> Tensor:
    """Unweighted output of each choice that has a slot: y[t, k] = expert(x[t]).

    The launch is that of `run_experts_decode` and `correct_experts`, which makes the outputs theirs
    to the bit. Where experts have a norm of their own (`has_post_expert_norm`), apply it to
    the complete y and finish with `reduce_choices`.

    Args:
        weights: [T, K] float; only the dtype matters, so that the launch is the very same.
        partial: [T, K, H], dtype of `x`, contiguous, or None: rows of choices without a slot.
        x, slots, bank, form: see `run_experts_decode`.

    Returns:
        y [T, K, H], dtype of `x`; rows of choices without a slot are those of `partial`, or zeros.

    Raises:
        TypeError, ValueError, SpecMoEError: see `run_experts_decode`.
    """
    op = torch.ops.specmoe_kernels.run_resident_experts
    return op(x, slots, weights, partial, *bank, *form.as_args())


def _check(
    op: str, x: Tensor, slots: Tensor, weights: Tensor, bank: ExpertBank, form: ExpertForm
) -> tuple[int, int]:
    sizes = check_experts(op, x, slots, bank, form)
    check_routing_weights(op, weights, slots)
    return sizes


def _check_partial(op: str, partial: Tensor | None, x: Tensor, slots: Tensor) -> None:
    if partial is not None:
        shape = (*slots.shape, x.shape[1])
        check_tensor(op, "partial", partial, shape, (x.dtype,), like=x)


def _decode_fake(x: Tensor, slots: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    _check("run_experts_decode", x, slots, weights, *bank_and_form(rest))
    return x.new_empty(x.shape)


def _decode_cpu(x: Tensor, slots: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    bank, form = bank_and_form(rest)
    _check("run_experts_decode", x, slots, weights, bank, form)
    y = x.new_zeros((*slots.shape, x.shape[1]))
    compute_choices(y, x, slots, bank, form)
    return reduce_choices(y, weights, x.dtype)


def _decode_cuda(x: Tensor, slots: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    require_triton("run_experts_decode")
    from specmoe_compile.kernels.expert_mlp.launch import launch_down, launch_gate_up

    bank, form = bank_and_form(rest)
    _, inner = _check("run_experts_decode", x, slots, weights, bank, form)
    out = torch.empty_like(x)
    if slots.numel() == 0:
        return out.zero_()
    with torch.cuda.device(x.device):
        intermediate = x.new_empty((*slots.shape, inner))
        launch_gate_up(x, slots, bank, form, intermediate)
        launch_down(intermediate, slots, weights, bank, form, out)
    return out


def _resident_fake(
    x: Tensor, slots: Tensor, weights: Tensor, partial: Tensor | None, *rest: Any
) -> Tensor:
    op = "run_resident_experts"
    _check(op, x, slots, weights, *bank_and_form(rest))
    _check_partial(op, partial, x, slots)
    return x.new_empty((*slots.shape, x.shape[1]))


def _resident_cpu(
    x: Tensor, slots: Tensor, weights: Tensor, partial: Tensor | None, *rest: Any
) -> Tensor:
    bank, form = bank_and_form(rest)
    _check("run_resident_experts", x, slots, weights, bank, form)
    _check_partial("run_resident_experts", partial, x, slots)
    y = x.new_zeros((*slots.shape, x.shape[1])) if partial is None else partial.clone()
    compute_choices(y, x, slots, bank, form)
    return y


def _resident_cuda(
    x: Tensor, slots: Tensor, weights: Tensor, partial: Tensor | None, *rest: Any
) -> Tensor:
    require_triton("run_resident_experts")
    from specmoe_compile.kernels.expert_mlp.launch import launch_down, launch_gate_up

    bank, form = bank_and_form(rest)
    _, inner = _check("run_resident_experts", x, slots, weights, bank, form)
    _check_partial("run_resident_experts", partial, x, slots)
    y = x.new_empty((*slots.shape, x.shape[1]))
    if slots.numel() == 0:
        return y
    with torch.cuda.device(x.device):
        intermediate = x.new_empty((*slots.shape, inner))
        launch_gate_up(x, slots, bank, form, intermediate)
        # The kernel always sums; nobody reads this sum.
        launch_down(
            intermediate, slots, weights, bank, form, torch.empty_like(x), partial=partial, y=y
        )
    return y


implement("run_experts_decode", cpu=_decode_cpu, cuda=_decode_cuda, fake=_decode_fake)
implement("run_resident_experts", cpu=_resident_cpu, cuda=_resident_cuda, fake=_resident_fake)
