"""Triton kernels of prefill: matrix products of all tokens of an expert at once.

Choices (token, k) are sorted by slot and cut into tiles (`plan`); a program multiplies one tile by
one block of its expert's outputs. One launch per projection. Tiles of a slot are neighbours in the
grid, so that the weights they share are read from device memory once and from L2 after that.

A row's sum depends on its own inputs only, never on the other rows of its tile: computing experts
in several calls gives the bits of one call. No atomics.

Rounding: sums in fp32; the intermediate and the outputs are rounded to the dtype of x. Products of
float32 are true float32 products, not TF32.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots, N = T * K choices.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from specmoe_compile.kernels.common import activate, apply_gate
from specmoe_compile.kernels.expert_form import ExpertBank, ExpertForm
from specmoe_compile.kernels.expert_mlp.config import ceil_div
from specmoe_compile.kernels.grouped_experts.config import (
    GroupedConfig,
    down_config,
    gate_up_config,
)
from specmoe_compile.kernels.grouped_experts.plan import TilePlan


@triton.jit
def _load_weights(
    weights,
    inputs,
    outputs,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Tile [inputs, outputs] of a matrix that is [WIDTH, LENGTH], or [LENGTH, WIDTH] transposed."""
    mask = (inputs < LENGTH)[:, None] & (outputs < WIDTH)[None, :]
    if TRANSPOSED:
        at = (inputs * WIDTH)[:, None] + outputs[None, :]
    else:
        at = inputs[:, None] + (outputs * LENGTH)[None, :]
    return tl.load(weights + at, mask=mask, other=0.0)


@triton.jit
def grouped_gate_up_kernel(
    x,
    order,
    tile_slot,
    tile_start,
    tile_end,
    up,
    up_bias,
    intermediate,
    up_stride,
    bias_stride,
    alpha,
    limit,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """intermediate[i] = gate(up[slot of i] @ x[token of i]) for choices i in the order of the plan.

    Grid: (M tiles, ceil(I / BLOCK_N)).

    Args:
        x: [T, H]; intermediate: [N, I], dtype of x, rows in the order of the plan; contiguous.
        order, tile_slot, tile_start, tile_end: see `TilePlan`.
        up, up_bias: [S, 2I or I, H] or transposed, [S, 2I or I]; strides from slot to slot.
        alpha, limit: fp32, see `apply_gate`.
    """
    slot = tl.load(tile_slot + tl.program_id(0)).to(tl.int64)
    if slot < 0:
        return
    rows = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_mask = rows < tl.load(tile_end + tl.program_id(0))
    tokens = tl.load(order + rows, mask=row_mask, other=0).to(tl.int64) // K
    x_rows = x + (tokens * H)[:, None]
    up += slot * up_stride
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = outputs < I
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP_OFFSET: tl.constexpr = 1 if INTERLEAVED else I
    WIDTH: tl.constexpr = 2 * I if HAS_GATE else I

    if TRANSPOSED and INTERLEAVED:
        # Gate and up lie side by side: one strip of 2 * BLOCK_N columns, parted at the end.
        pairs = tl.program_id(1) * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for start in range(0, H, BLOCK_IN):
            inputs = start + tl.arange(0, BLOCK_IN)
            x_mask = row_mask[:, None] & (inputs < H)[None, :]
            a = tl.load(x_rows + inputs[None, :], mask=x_mask, other=0.0)
            b = _load_weights(up, inputs, pairs, H, WIDTH, TRANSPOSED)
            both = tl.dot(a, b, both, input_precision="ieee")
        gate, value = tl.split(tl.reshape(both, [BLOCK_M, BLOCK_N, 2]))
    else:
        # Outputs past I wrap around to others that exist, and are not stored.
        within = tl.where(mask, outputs, 0)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, H, BLOCK_IN):
            inputs = start + tl.arange(0, BLOCK_IN)
            x_mask = row_mask[:, None] & (inputs < H)[None, :]
            a = tl.load(x_rows + inputs[None, :], mask=x_mask, other=0.0)
            b = _load_weights(up, inputs, within * STEP, H, WIDTH, TRANSPOSED)
            gate = tl.dot(a, b, gate, input_precision="ieee")
            if HAS_GATE:
                b = _load_weights(up, inputs, within * STEP + UP_OFFSET, H, WIDTH, TRANSPOSED)
                value = tl.dot(a, b, value, input_precision="ieee")

    if HAS_BIAS:
        bias = up_bias + slot * bias_stride + outputs * STEP
        gate += tl.load(bias, mask=mask, other=0.0).to(tl.float32)[None, :]
        if HAS_GATE:
            value += tl.load(bias + UP_OFFSET, mask=mask, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        result = apply_gate(gate, value, alpha, limit, ACTIVATION, LIMITED, LIMIT_AFTER)
    else:
        result = activate(gate, ACTIVATION)
    target = intermediate + (rows.to(tl.int64) * I)[:, None] + outputs[None, :]
    out_mask = row_mask[:, None] & mask[None, :]
    tl.store(target, result.to(intermediate.dtype.element_ty), mask=out_mask)


@triton.jit
def grouped_down_kernel(
    intermediate,
    order,
    tile_slot,
    tile_start,
    tile_end,
    down,
    down_bias,
    y,
    down_stride,
    bias_stride,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """y[order[i]] = down[slot of i] @ intermediate[i]; rows of choices without a slot stay.

    Grid: (M tiles, ceil(H / BLOCK_N)).

    Args:
        intermediate: [N, I], rows in the order of the plan; y: [N, H], same dtype, contiguous.
        order, tile_slot, tile_start, tile_end: see `TilePlan`.
        down, down_bias: [S, H, I] or transposed, [S, H]; strides from slot to slot.
    """
    slot = tl.load(tile_slot + tl.program_id(0)).to(tl.int64)
    if slot < 0:
        return
    rows = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_mask = rows < tl.load(tile_end + tl.program_id(0))
    choices = tl.load(order + rows, mask=row_mask, other=0).to(tl.int64)
    a_rows = intermediate + (rows.to(tl.int64) * I)[:, None]
    down += slot * down_stride
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, I, BLOCK_IN):
        inputs = start + tl.arange(0, BLOCK_IN)
        a_mask = row_mask[:, None] & (inputs < I)[None, :]
        a = tl.load(a_rows + inputs[None, :], mask=a_mask, other=0.0)
        b = _load_weights(down, inputs, outputs, I, H, TRANSPOSED)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    mask = outputs < H
    if HAS_BIAS:
        bias = tl.load(down_bias + slot * bias_stride + outputs, mask=mask, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    target = y + (choices * H)[:, None] + outputs[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=row_mask[:, None] & mask[None, :])


def launch_grouped(
    x: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    plan: TilePlan,
    rows: int,
    intermediate: Tensor,
    y: Tensor,
) -> None:
    """Launch both projections on the current stream; writes `intermediate` and `y`.

    Args:
        plan: of tiles of `rows` choices.
        intermediate: [N, I], scratch.
        y: [T, K, H]; rows of choices without a slot stay as they are.
    """
    hidden, inner = bank.sizes(form)
    tiles = plan.slot.numel()
    config = gate_up_config(rows, x.element_size(), has_gate=form.has_gate)
    up_bias = bank.up if bank.up_bias is None else bank.up_bias
    has_bias = bank.up_bias is not None
    grouped_gate_up_kernel[(tiles, ceil_div(inner, config.block_n))](
        x,
        *plan,
        bank.up,
        up_bias,
        intermediate,
        bank.up.stride(0),
        up_bias.stride(0),
        form.alpha,
        form.limit,
        **gate_up_constexprs(hidden, inner, y.shape[1], form, config, has_bias=has_bias),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    config = down_config(rows, x.element_size())
    down_bias = bank.down if bank.down_bias is None else bank.down_bias
    grouped_down_kernel[(tiles, ceil_div(hidden, config.block_n))](
        intermediate,
        *plan,
        bank.down,
        down_bias,
        y,
        bank.down.stride(0),
        down_bias.stride(0),
        **down_constexprs(hidden, inner, form, config, has_bias=has_bias),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def gate_up_constexprs(
    hidden: int, inner: int, top_k: int, form: ExpertForm, config: GroupedConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `grouped_gate_up_kernel`."""
    return {
        "H": hidden,
        "I": inner,
        "K": top_k,
        "HAS_GATE": form.has_gate,
        "HAS_BIAS": has_bias,
        "INTERLEAVED": form.interleaved,
        "TRANSPOSED": form.transposed,
        "ACTIVATION": form.activation,
        "LIMITED": form.is_limited,
        "LIMIT_AFTER": form.limit_after,
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
