"""Triton kernels of decode for coded weights: the two launches of `expert_mlp`, from planes.

A program reads a tile of rows by words of codes, 16 bytes of each lane along the inputs, decodes it
by arithmetic (`codes`) and multiplies by the tokens in float32. What a lane sums of one group is
multiplied by the group's scale once; lanes are summed at the very end. So the result is that of the
float32 values of the codes, summed in float32: neither weights nor activations are narrowed.

Planes are row-major whatever the model's own weights are, see `WeightCode`. All else is as in
`expert_mlp.kernel`: a choice's output has the same bits whether it is computed at once or late.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots, R rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specmoe_compile.kernels.common import activate, apply_gate
from specmoe_compile.kernels.expert_mlp.sum_choices import sum_choices
from specmoe_compile.kernels.packed_experts.codes import (
    code_factor,
    code_zero,
    decode_scale,
    decode_words,
)


@triton.jit
def _row_sums(
    x,
    x_at,
    x_mask,
    codes,
    codes_at,
    scales,
    scales_at,
    zeros,
    zeros_at,
    row_mask,
    table,
    LENGTH: tl.constexpr,
    BOOK: tl.constexpr,
    SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    CHOICES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Products of coded rows by their choice's inputs, [R] float32 with R = ROWS * CHOICES.

    Row r belongs to choice r % CHOICES. A scale per row is applied, a global factor is not.

    Args:
        x: inputs; choice c's begin at x_at[c] and are read where x_mask[c]; both [CHOICES].
        codes: int32 words; row r's begin at codes_at[r].
        scales, zeros: those of row r begin at scales_at[r], zeros_at[r]; COLUMNS inputs share one,
            0 for all of a row.
        row_mask: [R], rows to read; the sums of others are 0.
        UNIT: inputs that are summed before they are scaled; a lane's, and part of a group.
    """
    R: tl.constexpr = ROWS * CHOICES
    PER_WORD: tl.constexpr = 4 if BOOK == "e4m3" or BOOK == "int8" else 8
    WORDS: tl.constexpr = BLOCK_IN // PER_WORD
    UNITS: tl.constexpr = BLOCK_IN // UNIT
    acc = tl.zeros([R, UNITS], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_IN, num_stages=NUM_STAGES):
        # All loads before the first use: a barrier between them would cost one more latency.
        at = start // PER_WORD + tl.arange(0, WORDS)
        tile_mask = row_mask[:, None] & (at < LENGTH // PER_WORD)[None, :]
        words = tl.load(codes + codes_at[:, None] + at[None, :], mask=tile_mask, other=0)
        units = start + tl.arange(0, UNITS) * UNIT
        unit_mask = row_mask[:, None] & (units < LENGTH)[None, :]
        group = units // COLUMNS if COLUMNS else units * 0
        if COLUMNS:
            scale = tl.load(scales + scales_at[:, None] + group[None, :], mask=unit_mask, other=0)
        if HAS_ZERO:
            zero = tl.load(zeros + zeros_at[:, None] + group[None, :], mask=unit_mask, other=0)
        inputs = start + tl.arange(0, BLOCK_IN)
        v_mask = x_mask[:, None] & (inputs < LENGTH)[None, :]
        v = tl.load(x + x_at[:, None] + inputs[None, :], mask=v_mask, other=0.0).to(tl.float32)

        values = decode_words(words, table, R, WORDS, BOOK)
        if HAS_ZERO:
            # 1024 is what `decode_words` adds to a code of int4.
            offset = zero.to(tl.float32) + 1024.0
            values = tl.reshape(values, [R, UNITS, UNIT]) - offset[:, :, None]
        elif BOOK == "int4" or BOOK == "int8":
            values -= code_zero(BOOK)
        products = tl.reshape(values, [ROWS, CHOICES, BLOCK_IN]) * v[None, :, :]
        sums = tl.sum(tl.reshape(products, [R, UNITS, UNIT]), axis=2) * code_factor(BOOK)
        if COLUMNS:
            acc += sums * decode_scale(scale, SCALE)
        else:
            acc += sums
    total = tl.sum(acc, axis=1)
    if not COLUMNS:
        scale = tl.load(scales + scales_at, mask=row_mask, other=0)
        total *= decode_scale(scale, SCALE)
    return total


@triton.jit(do_not_specialize_on_alignment=["slots"])
def packed_gate_up_kernel(
    x,
    slots,
    codes,
    scales,
    zeros,
    factors,
    up_bias,
    table,
    intermediate,
    code_stride,
    scale_stride,
    zero_stride,
    factor_stride,
    bias_stride,
    alpha,
    limit,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    BOOK: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """intermediate[t, k] = gate(up[slots[t, k]] @ x[t]); absent choices (slot < 0) are left alone.

    Grid: (T * K, ceil(I / BLOCK_OUT)). A gate and its up are neighbouring rows of a tile.

    Args:
        x: [T, H]; slots: [T, K] integers; intermediate: [T, K, I], dtype of x; all contiguous.
        codes: [S, 2I or I, words] int32; scales, zeros: [S, 2I / BLOCK_ROWS, H / COLUMNS];
            factors: [S, 2I] float32, the global ones; up_bias: [S, 2I]. Strides in elements from
            slot to slot. What the code has not is never followed.
        table, alpha, limit: see `decode_words`, `apply_gate`.
    """
    choice = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + choice).to(tl.int64)
    if slot < 0:
        return
    PARTS: tl.constexpr = 2 if HAS_GATE else 1
    WORDS_OF_ROW: tl.constexpr = H // (4 if BOOK == "e4m3" or BOOK == "int8" else 8)
    GROUPS: tl.constexpr = tl.cdiv(H, COLUMNS) if COLUMNS else 1
    tile = tl.arange(0, BLOCK_OUT * PARTS)
    outputs = tl.program_id(1) * BLOCK_OUT + tile // PARTS
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP_OFFSET: tl.constexpr = 1 if INTERLEAVED else I
    rows = outputs * STEP + (tile % PARTS) * UP_OFFSET
    row_mask = outputs < I
    scale_row = rows // BLOCK_ROWS if BLOCK_ROWS else rows * 0
    here = tl.arange(0, 1)
    sums = _row_sums(
        x + (choice // K) * H,
        here,
        here == 0,
        codes + slot * code_stride,
        rows * WORDS_OF_ROW,
        scales + slot * scale_stride,
        scale_row * GROUPS,
        zeros + slot * zero_stride,
        scale_row * GROUPS,
        row_mask,
        table,
        H,
        BOOK,
        SCALE,
        COLUMNS,
        HAS_ZERO,
        BLOCK_OUT * PARTS,
        1,
        UNIT,
        BLOCK_IN,
        NUM_STAGES,
    )
    if HAS_GLOBAL:
        sums *= tl.load(factors + slot * factor_stride + rows, mask=row_mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(up_bias + slot * bias_stride + rows, mask=row_mask, other=0.0)
        sums += bias.to(tl.float32)
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    if HAS_GATE:
        gate, value = tl.split(tl.reshape(sums, [BLOCK_OUT, 2]))
        result = apply_gate(gate, value, alpha, limit, ACTIVATION, LIMITED, LIMIT_AFTER)
    else:
        result = activate(sums, ACTIVATION)
    target = intermediate + choice * I + outputs
    tl.store(target, result.to(intermediate.dtype.element_ty), mask=outputs < I)


@triton.jit(
    do_not_specialize=["read_partial", "read_skipped", "store_y"],
    do_not_specialize_on_alignment=[
        "slots",
        "weights",
        "partial",
        "skipped",
        "default_vectors",
        "y",
        "out",
    ],
)
def packed_down_kernel(
    intermediate,
    slots,
    weights,
    codes,
    scales,
    zeros,
    factors,
    down_bias,
    table,
    partial,
    skipped,
    default_vectors,
    y,
    out,
    code_stride,
    scale_stride,
    zero_stride,
    factor_stride,
    bias_stride,
    read_partial,
    read_skipped,
    store_y,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BOOK: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] * y[t, k], as `expert_mlp.kernel.down_kernel`.

    Grid: (T, ceil(H / BLOCK_OUT)). All K choices are read side by side.

    Args:
        intermediate: [T, K, I]; slots: [T, K] integers, -1 for not computed now.
        codes: [S, H, words] int32; scales, zeros: [S, H / BLOCK_ROWS, I / COLUMNS]; factors: [S, H]
            float32; down_bias: [S, H]; table: see `decode_words`. The rest as in `down_kernel`.
    """
    token = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    choices = token * K + ks
    slot_of_k = tl.load(slots + choices, mask=ks < K, other=-1)
    sums = tl.zeros([BLOCK_OUT * BLOCK_K], tl.float32)
    if tl.max(slot_of_k, axis=0) >= 0:
        WORDS_OF_ROW: tl.constexpr = I // (4 if BOOK == "e4m3" or BOOK == "int8" else 8)
        GROUPS: tl.constexpr = tl.cdiv(I, COLUMNS) if COLUMNS else 1
        tile = tl.arange(0, BLOCK_OUT * BLOCK_K)
        rows = tl.program_id(1) * BLOCK_OUT + tile // BLOCK_K
        k = tile % BLOCK_K
        slot = tl.load(slots + token * K + k, mask=k < K, other=-1).to(tl.int64)
        row_mask = (slot >= 0) & (rows < H)
        slot = tl.maximum(slot, 0)
        scale_row = rows // BLOCK_ROWS if BLOCK_ROWS else rows * 0
        sums = _row_sums(
            intermediate,
            choices * I,
            slot_of_k >= 0,
            codes,
            slot * code_stride + rows * WORDS_OF_ROW,
            scales,
            slot * scale_stride + scale_row * GROUPS,
            zeros,
            slot * zero_stride + scale_row * GROUPS,
            row_mask,
            table,
            I,
            BOOK,
            SCALE,
            COLUMNS,
            HAS_ZERO,
            BLOCK_OUT,
            BLOCK_K,
            UNIT,
            BLOCK_IN,
            NUM_STAGES,
        )
        if HAS_GLOBAL:
            sums *= tl.load(factors + slot * factor_stride + rows, mask=row_mask, other=0.0)
    sum_choices(
        tl.reshape(sums, [BLOCK_OUT, BLOCK_K]),
        token,
        tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT),
        slots,
        weights,
        down_bias,
        partial,
        skipped,
        default_vectors,
        y,
        out,
        bias_stride,
        read_partial,
        read_skipped,
        store_y,
        H,
        K,
        HAS_BIAS,
        BLOCK_K,
    )
