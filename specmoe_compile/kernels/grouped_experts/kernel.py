"""Triton kernels of prefill: matrix products of all tokens of an expert at once.

Choices (token, k) are sorted by slot and cut into tiles (`plan`); a program multiplies one tile by
one block of its expert's outputs. One launch per projection. Programs run slot by slot, and within
a slot all tiles of one block of outputs before the next block: what they share, weights and inputs,
is read from device memory once and from L2 after that.

A row's sum depends on its own inputs only, never on the other rows of its tile: computing experts
in several calls gives the bits of one call. No atomics.

Rounding: sums in fp32; the intermediate and the outputs are rounded to the dtype of x. Products of
float32 are true float32 products, not TF32.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots, N = T * K choices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specmoe_compile.kernels.common import activate, apply_gate


@triton.jit
def _locate(tile_slot, tile_start, tile_end, tile_first, tile_count, BLOCKS: tl.constexpr):
    """Slot, first and last row, and block of outputs of this program; see `TilePlan`.

    The programs of a slot are numbered first * BLOCKS .. (first + count) * BLOCKS.
    """
    program = tl.program_id(0)
    any_tile = program // BLOCKS
    first = tl.load(tile_first + any_tile)
    count = tl.maximum(tl.load(tile_count + any_tile), 1)
    within = program - first * BLOCKS
    tile = first + within % count
    slot = tl.load(tile_slot + any_tile).to(tl.int64)
    # Of a tile that is not needed `first` and `count` mean nothing.
    tile = tl.where(slot < 0, 0, tile)
    return slot, tl.load(tile_start + tile), tl.load(tile_end + tile), within // count


@triton.jit
def _tile_mask(row_mask, inputs, LENGTH: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Mask of a tile [rows, inputs]; a LENGTH that the blocks divide costs nothing."""
    if LENGTH % BLOCK_IN == 0:
        return row_mask[:, None] & (inputs >= 0)[None, :]
    else:
        return row_mask[:, None] & (inputs < LENGTH)[None, :]


@triton.jit
def _load_weights(
    weights,
    inputs,
    outputs,
    output_mask,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Tile [inputs, outputs] of a matrix that is [WIDTH, LENGTH], or [LENGTH, WIDTH] transposed."""
    mask = tl.trans(_tile_mask(output_mask, inputs, LENGTH, BLOCK_IN))
    if TRANSPOSED:
        at = (inputs * WIDTH)[:, None] + outputs[None, :]
    else:
        at = inputs[:, None] + (outputs * LENGTH)[None, :]
    return tl.load(weights + at, mask=mask, other=0.0)


@triton.jit
def _add_product(
    acc,
    a,
    b,
    scales,
    outputs,
    output_mask,
    start,
    LENGTH: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):
    """acc + a @ b, where scales are left apart times the scale of each output's group.

    A scale of a whole row is left to `_scale_rows`.
    """
    if SCALE_COLUMNS == 0 or SCALE_COLUMNS >= LENGTH:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        at = (outputs // SCALE_ROWS) * tl.cdiv(LENGTH, SCALE_COLUMNS) + start // SCALE_COLUMNS
        scale = tl.load(scales + at, mask=output_mask, other=0.0)
        acc += tl.dot(a, b, input_precision="ieee") * scale[None, :]
    return acc


@triton.jit
def _scale_rows(
    acc,
    scales,
    outputs,
    output_mask,
    LENGTH: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):
    """acc times the scales of whole rows, if that is how weights are scaled."""
    if SCALE_COLUMNS >= LENGTH:
        scale = tl.load(scales + outputs // SCALE_ROWS, mask=output_mask, other=0.0)
        acc *= scale[None, :]
    return acc


@triton.jit
def grouped_gate_up_kernel(
    x,
    order,
    tile_slot,
    tile_start,
    tile_end,
    tile_first,
    tile_count,
    up,
    up_bias,
    up_scales,
    intermediate,
    up_stride,
    bias_stride,
    scale_stride,
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
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """intermediate[i] = gate(up[slot of i] @ x[token of i]) for choices i in the order of the plan.

    Grid: (M tiles * ceil(I / BLOCK_N),).

    Args:
        x: [T, H]; intermediate: [N, I], dtype of x, rows in the order of the plan; contiguous.
        order, tile_slot, tile_start, tile_end, tile_first, tile_count: see `TilePlan`.
        up, up_bias: [S, 2I or I, H] or transposed, [S, 2I or I]; strides from slot to slot.
        up_scales: [S, 2I / SCALE_ROWS, H / SCALE_COLUMNS] float32, factors that `up` lacks, never
            of a transposed one; not followed where SCALE_COLUMNS is 0.
        alpha, limit: fp32, see `apply_gate`.
    """
    slot, row, end, block = _locate(
        tile_slot, tile_start, tile_end, tile_first, tile_count, tl.cdiv(I, BLOCK_N)
    )
    if slot < 0:
        return
    rows = row + tl.arange(0, BLOCK_M)
    row_mask = rows < end
    tokens = tl.load(order + rows, mask=row_mask, other=0).to(tl.int64) // K
    x_rows = x + (tokens * H)[:, None]
    up += slot * up_stride
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = outputs < I
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP_OFFSET: tl.constexpr = 1 if INTERLEAVED else I
    WIDTH: tl.constexpr = 2 * I if HAS_GATE else I
    gates, values = outputs * STEP, outputs * STEP + UP_OFFSET
    up_scales += slot * scale_stride

    if TRANSPOSED and INTERLEAVED:
        # Gate and up lie side by side: one strip of 2 * BLOCK_N columns, parted at the end.
        pairs = block * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for start in range(0, H, BLOCK_IN):
            inputs = start + tl.arange(0, BLOCK_IN)
            x_mask = _tile_mask(row_mask, inputs, H, BLOCK_IN)
            a = tl.load(x_rows + inputs[None, :], mask=x_mask, other=0.0)
            b = _load_weights(up, inputs, pairs, pairs < WIDTH, H, WIDTH, TRANSPOSED, BLOCK_IN)
            both = tl.dot(a, b, both, input_precision="ieee")
        gate, value = tl.split(tl.reshape(both, [BLOCK_M, BLOCK_N, 2]))
    else:
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, H, BLOCK_IN):
            inputs = start + tl.arange(0, BLOCK_IN)
            x_mask = _tile_mask(row_mask, inputs, H, BLOCK_IN)
            a = tl.load(x_rows + inputs[None, :], mask=x_mask, other=0.0).to(up.dtype.element_ty)
            b = _load_weights(up, inputs, gates, mask, H, WIDTH, TRANSPOSED, BLOCK_IN)
            gate = _add_product(
                gate, a, b, up_scales, gates, mask, start, H, SCALE_ROWS, SCALE_COLUMNS
            )
            if HAS_GATE:
                b = _load_weights(up, inputs, values, mask, H, WIDTH, TRANSPOSED, BLOCK_IN)
                value = _add_product(
                    value, a, b, up_scales, values, mask, start, H, SCALE_ROWS, SCALE_COLUMNS
                )
        gate = _scale_rows(gate, up_scales, gates, mask, H, SCALE_ROWS, SCALE_COLUMNS)
        if HAS_GATE:
            value = _scale_rows(value, up_scales, values, mask, H, SCALE_ROWS, SCALE_COLUMNS)

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
    tile_first,
    tile_count,
    down,
    down_bias,
    down_scales,
    y,
    down_stride,
    bias_stride,
    scale_stride,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """y[order[i]] = down[slot of i] @ intermediate[i]; rows of choices without a slot stay.

    Grid: (M tiles * ceil(H / BLOCK_N),).

    Args:
        intermediate: [N, I], rows in the order of the plan; y: [N, H], same dtype, contiguous.
        order, tile_slot, tile_start, tile_end, tile_first, tile_count: see `TilePlan`.
        down, down_bias: [S, H, I] or transposed, [S, H]; strides from slot to slot.
        down_scales: [S, H / SCALE_ROWS, I / SCALE_COLUMNS] float32, see `grouped_gate_up_kernel`.
    """
    slot, row, end, block = _locate(
        tile_slot, tile_start, tile_end, tile_first, tile_count, tl.cdiv(H, BLOCK_N)
    )
    if slot < 0:
        return
    rows = row + tl.arange(0, BLOCK_M)
    row_mask = rows < end
    choices = tl.load(order + rows, mask=row_mask, other=0).to(tl.int64)
    a_rows = intermediate + (rows.to(tl.int64) * I)[:, None]
    down += slot * down_stride
    down_scales += slot * scale_stride
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = outputs < H
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, I, BLOCK_IN):
        inputs = start + tl.arange(0, BLOCK_IN)
        a_mask = _tile_mask(row_mask, inputs, I, BLOCK_IN)
        a = tl.load(a_rows + inputs[None, :], mask=a_mask, other=0.0).to(down.dtype.element_ty)
        b = _load_weights(down, inputs, outputs, mask, I, H, TRANSPOSED, BLOCK_IN)
        acc = _add_product(
            acc, a, b, down_scales, outputs, mask, start, I, SCALE_ROWS, SCALE_COLUMNS
        )
    acc = _scale_rows(acc, down_scales, outputs, mask, I, SCALE_ROWS, SCALE_COLUMNS)
    if HAS_BIAS:
        bias = tl.load(down_bias + slot * bias_stride + outputs, mask=mask, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    target = y + (choices * H)[:, None] + outputs[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=row_mask[:, None] & mask[None, :])
