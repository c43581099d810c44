"""Launching the packed kernels: from a bank and a form to pointers, strides and constants.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.config import (
    DOWN_FP_FUSION,
    GemvConfig,
    ceil_div,
    gemv_down_constexprs,
    up_constexprs,
)
from specmoe_compile.kernels.packed_experts.config import (
    down_config,
    gate_up_config,
    unit_of,
    up_fuses,
)
from specmoe_compile.kernels.packed_experts.kernel import packed_down_kernel, packed_gate_up_kernel
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm
from specmoe_compile.runtime.experts.formats.code_books import NF4_VALUES
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes


@lru_cache(maxsize=16)
def _nf4_table(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def plane_args(
    planes: WeightPlanes, bias: Tensor | None, code: WeightCode
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Pointers (codes, scales, zeros, factors, bias, table) and strides between slots.

    Args:
        planes: of a bank, [S, ...]; codes are seen as int32 words. What is None is replaced by
            another tensor, which is never followed.
    """
    words = planes.codes.view(torch.int32)
    assert planes.scales is not None, "a coded weight has scales"
    zeros = planes.scales if planes.zeros is None else planes.zeros
    factors = planes.scales if planes.global_ is None else planes.global_
    bias = planes.scales if bias is None else bias
    table = _nf4_table(words.device) if code.book == "nf4" else words
    pointers = (words, planes.scales, zeros, factors, bias)
    return (*pointers, table), tuple(tensor.stride(0) for tensor in pointers)


def launch_packed_gate_up(
    x: Tensor,
    slots: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    intermediate: Tensor,
    config: GemvConfig | None = None,
) -> None:
    """Launch `packed_gate_up_kernel` on the current stream; writes `intermediate`, [T, K, I]."""
    hidden, inner = bank.sizes(form)
    code = form.format.up
    if config is None:
        config = gate_up_config(hidden, code, has_gate=form.has_gate)
    pointers, strides = plane_args(bank.up_planes, bank.up_bias, code)
    packed_gate_up_kernel[(slots.numel(), ceil_div(inner, config.block_out))](
        x,
        slots,
        *pointers,
        intermediate,
        *strides,
        form.alpha,
        form.limit,
        **packed_gate_up_constexprs(
            hidden, inner, slots.shape[1], form, config, has_bias=bank.up_bias is not None
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=up_fuses(config, code, has_gate=form.has_gate),
    )


def launch_packed_down(
    intermediate: Tensor,
    slots: Tensor,
    weights: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    out: Tensor,
    *,
    partial: Tensor,
    skipped: Tensor,
    default_vectors: Tensor,
    y: Tensor,
    reads: tuple[int, int, int],
    config: GemvConfig | None = None,
) -> None:
    """Launch `packed_down_kernel` on the current stream; see `expert_mlp.launch.launch_down`.

    Args:
        reads: read_partial, read_skipped and store_y.
    """
    hidden, inner = bank.sizes(form)
    tokens, top_k = slots.shape
    if config is None:
        config = down_config(inner, top_k, form.format.down)
    pointers, strides = plane_args(bank.down_planes, bank.down_bias, form.format.down)
    packed_down_kernel[(tokens, ceil_div(hidden, config.block_out))](
        intermediate,
        slots,
        weights,
        *pointers,
        partial,
        skipped,
        default_vectors,
        y,
        out,
        *strides,
        *reads,
        **packed_down_constexprs(
            hidden, inner, top_k, form, config, has_bias=bank.down_bias is not None
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=DOWN_FP_FUSION,
    )


def code_constexprs(code: WeightCode, length: int) -> dict[str, Any]:
    """Compile-time arguments that say how a row of `length` inputs is coded."""
    rows, columns = code.block
    return {
        "BOOK": code.book,
        "SCALE": code.scale,
        "BLOCK_ROWS": rows,
        "COLUMNS": 0 if columns >= length else columns,
        "HAS_ZERO": code.has_zero,
        "HAS_GLOBAL": code.has_global,
        "UNIT": unit_of(code, length),
    }


def packed_gate_up_constexprs(
    hidden: int, inner: int, top_k: int, form: ExpertForm, config: GemvConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `packed_gate_up_kernel`."""
    return {
        **up_constexprs(hidden, inner, top_k, form, has_bias=has_bias),
        **code_constexprs(form.format.up, hidden),
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "NUM_STAGES": config.num_stages,
    }


def packed_down_constexprs(
    hidden: int, inner: int, top_k: int, form: ExpertForm, config: GemvConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `packed_down_kernel`."""
    return {
        **gemv_down_constexprs(hidden, inner, top_k, config, has_bias=has_bias),
        **code_constexprs(form.format.down, inner),
    }
