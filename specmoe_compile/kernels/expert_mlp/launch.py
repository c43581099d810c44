"""Launching the decode kernels: from a bank and a form to pointers, strides and constants.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.config import (
    DOWN_FP_FUSION,
    GemvConfig,
    ceil_div,
    down_config,
    gate_up_config,
    gemv_down_constexprs,
    up_constexprs,
)
from specmoe_compile.kernels.expert_mlp.kernel import down_kernel, gate_up_kernel
from specmoe_compile.kernels.packed_experts.launch import launch_packed_down, launch_packed_gate_up
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm


def launch_gate_up(
    x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm, intermediate: Tensor
) -> None:
    """Launch `gate_up_kernel` on the current stream; writes `intermediate`, [T, K, I].

    Coded weights have a kernel of their own.
    """
    if not form.format.up.is_plain:
        launch_packed_gate_up(x, slots, bank, form, intermediate)
        return
    hidden, inner = bank.sizes(form)
    config = gate_up_config(
        hidden, x.element_size(), has_gate=form.has_gate, transposed=form.transposed
    )
    up_bias = bank.up if bank.up_bias is None else bank.up_bias
    gate_up_kernel[(slots.numel(), ceil_div(inner, config.block_out))](
        x,
        slots,
        bank.up,
        up_bias,
        intermediate,
        bank.up.stride(0),
        up_bias.stride(0),
        form.alpha,
        form.limit,
        **gate_up_constexprs(
            hidden, inner, slots.shape[1], form, config, has_bias=bank.up_bias is not None
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def launch_down(
    intermediate: Tensor,
    slots: Tensor,
    weights: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    out: Tensor,
    *,
    partial: Tensor | None = None,
    skipped: Tensor | None = None,
    default_vectors: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Launch `down_kernel` on the current stream; writes `out` [T, H] and, if given, `y` [T, K, H].

    Tensors that are left out are replaced by others of their dtype, so that the same compiled
    kernel runs whatever is left out.
    """
    hidden, inner = bank.sizes(form)
    tokens, top_k = slots.shape
    reads = (int(partial is not None), int(skipped is not None), int(y is not None))
    partial = intermediate if partial is None else partial
    skipped = slots if skipped is None else skipped
    y = intermediate if y is None else y
    if default_vectors is None:
        default_vectors = intermediate.new_empty(1, dtype=torch.float32)
    if not form.format.down.is_plain:
        launch_packed_down(
            intermediate,
            slots,
            weights,
            bank,
            form,
            out,
            partial=partial,
            skipped=skipped,
            default_vectors=default_vectors,
            y=y,
            reads=reads,
        )
        return
    config = down_config(inner, top_k, intermediate.element_size(), transposed=form.transposed)
    down_bias = bank.down if bank.down_bias is None else bank.down_bias
    down_kernel[(tokens, ceil_div(hidden, config.block_out))](
        intermediate,
        slots,
        weights,
        bank.down,
        down_bias,
        partial,
        skipped,
        default_vectors,
        y,
        out,
        bank.down.stride(0),
        down_bias.stride(0),
        *reads,
        **down_constexprs(hidden, inner, top_k, form, config, has_bias=bank.down_bias is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=DOWN_FP_FUSION,
    )


def gate_up_constexprs(
    hidden: int, inner: int, top_k: int, form: ExpertForm, config: GemvConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `gate_up_kernel`."""
    return {
        **up_constexprs(hidden, inner, top_k, form, has_bias=has_bias),
        "TRANSPOSED": form.transposed,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "NUM_STAGES": config.num_stages,
    }


def down_constexprs(
    hidden: int, inner: int, top_k: int, form: ExpertForm, config: GemvConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `down_kernel`."""
    return {
        **gemv_down_constexprs(hidden, inner, top_k, config, has_bias=has_bias),
        "TRANSPOSED": form.transposed,
    }
