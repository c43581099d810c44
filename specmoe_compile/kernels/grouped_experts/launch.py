"""Launching the kernels of prefill: from a bank and a form to pointers, strides and constants.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, N = T * K choices.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from specmoe_compile.kernels.expert_mlp.config import ceil_div, up_constexprs
from specmoe_compile.kernels.grouped_experts.config import (
    GroupedConfig,
    down_config,
    gate_up_config,
)
from specmoe_compile.kernels.grouped_experts.kernel import (
    grouped_down_kernel,
    grouped_gate_up_kernel,
)
from specmoe_compile.kernels.grouped_experts.plan import TilePlan
from specmoe_compile.kernels.packed_experts.expand import Scales
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm


def launch_grouped(
    x: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    plan: TilePlan,
    rows: int,
    intermediate: Tensor,
    y: Tensor,
    scales: tuple[Scales | None, Scales | None] = (None, None),
) -> None:
    """Launch both projections on the current stream; writes `intermediate` and `y`.

    Args:
        plan: of tiles of `rows` choices.
        intermediate: [N, I], scratch.
        y: [T, K, H]; rows of choices without a slot stay as they are.
        scales: factors that `up` and `down` lack; None where they are the weights themselves.
    """
    hidden, inner = bank.sizes(form)
    tiles = plan.slot.numel()
    up_scales, down_scales = scales
    config = gate_up_config(
        rows,
        bank.up.element_size(),
        has_gate=form.has_gate,
        scale_columns=_group_columns(up_scales, hidden),
    )
    up_bias = bank.up if bank.up_bias is None else bank.up_bias
    has_bias = bank.up_bias is not None
    grouped_gate_up_kernel[(tiles * ceil_div(inner, config.block_n),)](
        x,
        *plan,
        bank.up,
        up_bias,
        bank.up if up_scales is None else up_scales.values,
        intermediate,
        bank.up.stride(0),
        up_bias.stride(0),
        0 if up_scales is None else up_scales.values.stride(0),
        form.alpha,
        form.limit,
        **gate_up_constexprs(hidden, inner, y.shape[1], form, config, has_bias=has_bias),
        **scale_constexprs(up_scales),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    config = down_config(
        rows, bank.down.element_size(), scale_columns=_group_columns(down_scales, inner)
    )
    down_bias = bank.down if bank.down_bias is None else bank.down_bias
    grouped_down_kernel[(tiles * ceil_div(hidden, config.block_n),)](
        intermediate,
        *plan,
        bank.down,
        down_bias,
        bank.down if down_scales is None else down_scales.values,
        y,
        bank.down.stride(0),
        down_bias.stride(0),
        0 if down_scales is None else down_scales.values.stride(0),
        **down_constexprs(hidden, inner, form, config, has_bias=has_bias),
        **scale_constexprs(down_scales),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _columns(scales: Scales | None) -> int:
    return 0 if scales is None else scales.columns


def _group_columns(scales: Scales | None, length: int) -> int:
    """Inputs of a group that is scaled within a row; 0 where rows are scaled as a whole."""
    columns = _columns(scales)
    return columns if columns < length else 0


def scale_constexprs(scales: Scales | None) -> dict[str, int]:
    """Compile-time arguments of both kernels that say which factors weights lack."""
    rows = 1 if scales is None else scales.rows
    return {"SCALE_ROWS": rows, "SCALE_COLUMNS": _columns(scales)}


def gate_up_constexprs(
    hidden: int, inner: int, top_k: int, form: ExpertForm, config: GroupedConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `grouped_gate_up_kernel`."""
    return {
        **up_constexprs(hidden, inner, top_k, form, has_bias=has_bias),
        "TRANSPOSED": form.transposed,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_IN": config.block_in,
    }


def down_constexprs(
    hidden: int, inner: int, form: ExpertForm, config: GroupedConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `grouped_down_kernel`."""
    return {
        "H": hidden,
        "I": inner,
        "HAS_BIAS": has_bias,
        "TRANSPOSED": form.transposed,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_IN": config.block_in,
    }
