"""Op `correct_experts`: partial result + late experts + default vectors of skipped ones.

Shape letters: T tokens, E experts, K top-k, H hidden, S slots.
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

_NAME = "correct_experts"
LIBRARY.define(
    f"{_NAME}(Tensor partial, Tensor x, Tensor slots, Tensor weights, Tensor? skipped,"
    f" Tensor? default_vectors, {BANK_SCHEMA}, {FORM_SCHEMA}) -> Tensor"
)


def correct_experts(
    partial: Tensor,
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    *,
    skipped: Tensor | None = None,
    default_vectors: Tensor | None = None,
) -> Tensor:
    """Complete a layer that `run_resident_experts` began.

    out[t] = sum over k of weights[t, k] * v[t, k], where v[t, k] is
    expert(x[t])                       if slots[t, k] >= 0    (arrived late, computed now), else
    default_vectors[skipped[t, k]]     if skipped[t, k] >= 0  (not fetched at all), else
    partial[t, k]                                             (computed by the earlier launch).

    With nothing skipped the result has the bits of `run_experts_decode` on all slots at once, on
    CUDA whatever was late; on the CPU as long as an expert is late for all of its tokens or none.

    Args:
        partial: [T, K, H], dtype of `x`, contiguous; rows that are not read may hold anything.
        x: [T, H] float32, bfloat16 or float16, contiguous.
        slots: [T, K] int32 or int64, contiguous: slots of late experts, -1 for all others.
        weights: [T, K] float, contiguous.
        bank: the weights, plain ones of the dtype of `x`.
        skipped: [T, K], dtype of `slots`, contiguous: experts whose default vector stands in for
            them, -1 for all others; None for no such expert.
        default_vectors: [E, H] float32, contiguous; None only without `skipped`.

    Returns:
        [T, H], dtype of `x`.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.
        SpecMoEError: CUDA tensors without Triton.
    """
    op = torch.ops.specmoe_kernels.correct_experts
    return op(partial, x, slots, weights, skipped, default_vectors, *bank, *form.as_args())


def _check(
    partial: Tensor,
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    skipped: Tensor | None,
    default_vectors: Tensor | None,
    bank: ExpertBank,
    form: ExpertForm,
) -> int:
    """Check all arguments and return I."""
    hidden, inner = check_experts(_NAME, x, slots, bank, form)
    check_routing_weights(_NAME, weights, slots)
    check_tensor(_NAME, "partial", partial, (*slots.shape, hidden), (x.dtype,), like=x)
    if (skipped is None) != (default_vectors is None):
        raise ValueError(
            f"specmoe_kernels::{_NAME}: skipped and default_vectors come together or not at all"
        )
    if skipped is not None and default_vectors is not None:
        check_tensor(_NAME, "skipped", skipped, tuple(slots.shape), (slots.dtype,), like=x)
        # One dtype only: another one would be another compiled kernel, which may sum differently.
        check_tensor(
            _NAME, "default_vectors", default_vectors, ("E", hidden), (torch.float32,), like=x
        )
    return inner


def _fake(
    partial: Tensor,
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    skipped: Tensor | None,
    default_vectors: Tensor | None,
    *rest: Any,
) -> Tensor:
    bank, form = bank_and_form(rest)
    _check(partial, x, slots, weights, skipped, default_vectors, bank, form)
    return x.new_empty(x.shape)


def _cpu(
    partial: Tensor,
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    skipped: Tensor | None,
    default_vectors: Tensor | None,
    *rest: Any,
) -> Tensor:
    bank, form = bank_and_form(rest)
    _check(partial, x, slots, weights, skipped, default_vectors, bank, form)
    y = partial.clone()
    compute_choices(y, x, slots, bank, form)
    values = y.float()
    if skipped is not None and default_vectors is not None:
        is_default = (slots < 0) & (skipped >= 0)
        defaults = default_vectors[skipped.clamp(min=0)]
        values = torch.where(is_default.unsqueeze(-1), defaults, values)
    return reduce_choices(values, weights, x.dtype)


def _cuda(
    partial: Tensor,
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    skipped: Tensor | None,
    default_vectors: Tensor | None,
    *rest: Any,
) -> Tensor:
    require_triton(_NAME)
    from specmoe_compile.kernels.correct_experts.kernel import launch_correct

    bank, form = bank_and_form(rest)
    inner = _check(partial, x, slots, weights, skipped, default_vectors, bank, form)
    out = torch.empty_like(x)
    if slots.numel() == 0:
        return out.zero_()
    with torch.cuda.device(x.device):
        intermediate = x.new_empty((*slots.shape, inner))
        launch_correct(
            partial, x, slots, weights, skipped, default_vectors, bank, form, intermediate, out
        )
    return out


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_fake)
