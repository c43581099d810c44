"""Triton kernels of decode: the up projection with its gate, the down projection with the sum.

Two launches compute a layer: `gate_up_kernel`, a program per choice (token, k) and block of
outputs, writes the intermediate [T, K, I]; `down_kernel`, a program per token and block of outputs,
computes the token's K choices and their weighted sum. Weights are read where they lie in the bank,
by slot.

`down_kernel` takes each choice from one of three places: computed now (slot >= 0), a default vector
(skipped >= 0), or the outputs of an earlier launch (`partial`). Executing all choices at once,
executing those that are resident, and completing them later are the same compiled kernel, told
apart by run-time flags only. So a choice's output has the same bits in all of them, and the sum
over K, in fp32, the same order.

Rounding: sums in fp32; the intermediate and each choice's output are rounded to the dtype of x.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specmoe_compile.kernels.common import activate, apply_gate
from specmoe_compile.kernels.expert_mlp.sum_choices import sum_choices


@triton.jit(do_not_specialize_on_alignment=["slots"])
def gate_up_kernel(
    x,
    slots,
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
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """intermediate[t, k] = gate(up[slots[t, k]] @ x[t]); absent choices (slot < 0) are left alone.

    Grid: (T * K, ceil(I / BLOCK_OUT)); programs that may share an expert's rows are neighbours.

    Args:
        x: [T, H]; slots: [T, K] integers; intermediate: [T, K, I], dtype of x; all contiguous.
        up: [S, 2I or I, H] or transposed, `up_stride` elements from slot to slot.
        up_bias: [S, 2I or I], `bias_stride` elements from slot to slot; unused without HAS_BIAS.
        alpha, limit: fp32, see `apply_gate`.
    """
    choice = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + choice).to(tl.int64)
    if slot < 0:
        return
    x += (choice // K) * H
    up += slot * up_stride
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = outputs < I
    # Where gate i and up i are among the outputs of the projection.
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP_OFFSET: tl.constexpr = 1 if INTERLEAVED else I
    WIDTH: tl.constexpr = 2 * I if HAS_GATE else I

    # `num_stages` makes loads of the next tiles go to shared memory while this one is summed: that,
    # more than many programs at once, keeps device memory busy.
    if TRANSPOSED and INTERLEAVED:
        # Gate and up lie side by side: one strip of 2 * BLOCK_OUT columns, parted at the end.
        pairs = tl.program_id(1) * (2 * BLOCK_OUT) + tl.arange(0, 2 * BLOCK_OUT)[None, :]
        both = tl.zeros([BLOCK_IN, 2 * BLOCK_OUT], tl.float32)
        for start in tl.range(0, H, BLOCK_IN, num_stages=NUM_STAGES):
            inputs = start + tl.arange(0, BLOCK_IN)
            v = tl.load(x + inputs, mask=inputs < H, other=0.0).to(tl.float32)
            w_mask = (inputs < H)[:, None] & (pairs < WIDTH)
            w = tl.load(up + (inputs * WIDTH)[:, None] + pairs, mask=w_mask, other=0.0)
            both += w.to(tl.float32) * v[:, None]
        gate, value = tl.split(tl.reshape(tl.sum(both, axis=0), [BLOCK_OUT, 2]))
    elif TRANSPOSED:
        columns = outputs[None, :]
        gates = tl.zeros([BLOCK_IN, BLOCK_OUT], tl.float32)
        values = tl.zeros([BLOCK_IN, BLOCK_OUT], tl.float32)
        for start in tl.range(0, H, BLOCK_IN, num_stages=NUM_STAGES):
            inputs = start + tl.arange(0, BLOCK_IN)
            v = tl.load(x + inputs, mask=inputs < H, other=0.0).to(tl.float32)
            w_mask = (inputs < H)[:, None] & mask[None, :]
            w = tl.load(up + (inputs * WIDTH)[:, None] + columns, mask=w_mask, other=0.0)
            gates += w.to(tl.float32) * v[:, None]
            if HAS_GATE:
                w = tl.load(up + (inputs * WIDTH + I)[:, None] + columns, mask=w_mask, other=0.0)
                values += w.to(tl.float32) * v[:, None]
        gate = tl.sum(gates, axis=0)
        value = tl.sum(values, axis=0)
    else:
        rows = up + (outputs * (STEP * H))[:, None]
        gates = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        values = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for start in tl.range(0, H, BLOCK_IN, num_stages=NUM_STAGES):
            inputs = start + tl.arange(0, BLOCK_IN)[None, :]
            v = tl.load(x + inputs, mask=inputs < H, other=0.0).to(tl.float32)
            w_mask = mask[:, None] & (inputs < H)
            w = tl.load(rows + inputs, mask=w_mask, other=0.0)
            gates += w.to(tl.float32) * v
            if HAS_GATE:
                w = tl.load(rows + UP_OFFSET * H + inputs, mask=w_mask, other=0.0)
                values += w.to(tl.float32) * v
        gate = tl.sum(gates, axis=1)
        value = tl.sum(values, axis=1)

    if HAS_BIAS:
        up_bias += slot * bias_stride + outputs * STEP
        gate += tl.load(up_bias, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            value += tl.load(up_bias + UP_OFFSET, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        result = apply_gate(gate, value, alpha, limit, ACTIVATION, LIMITED, LIMIT_AFTER)
    else:
        result = activate(gate, ACTIVATION)
    target = intermediate + choice * I + outputs
    tl.store(target, result.to(intermediate.dtype.element_ty), mask=mask)


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
def down_kernel(
    intermediate,
    slots,
    weights,
    down,
    down_bias,
    partial,
    skipped,
    default_vectors,
    y,
    out,
    down_stride,
    bias_stride,
    read_partial,
    read_skipped,
    store_y,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] * y[t, k], each y from the place the module names.

    Grid: (T, ceil(H / BLOCK_OUT)). All K choices are read side by side (BLOCK_K >= K, a power of
    two), so that a short I does not leave the memory idle between one choice and the next.

    Args:
        intermediate: [T, K, I]; slots: [T, K] integers, -1 for not computed now.
        weights: [T, K] float; partial: [T, K, H], dtype of `intermediate`.
        skipped: [T, K] integers, row of `default_vectors` or -1; default_vectors: [E, H] fp32.
        y: [T, K, H], written where `store_y`: computed and earlier outputs, zeros for the others.
        out: [T, H]. All of these contiguous.
        down: [S, H, I] or transposed; down_bias: [S, H]; strides in elements from slot to slot.
        read_partial, read_skipped, store_y: 0 or 1; where 0 the pointers are never followed.
    """
    token = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    choices = token * K + ks
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rest = (
        token,
        outputs,
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
    )
    # Where nothing is to be computed, no row is walked. How that is said decides how fast the other
    # launches are. On an H200 a branch around the loop makes GPT-OSS's, which are transposed, 15 %
    # slower and Qwen3's 2 to 4 %, leaving at once GPT-OSS's 12 % faster, Qwen3's 7 to 17 % slower.
    if TRANSPOSED:
        asked = tl.load(slots + choices, mask=ks < K, other=-1, cache_modifier=".ca")
        if tl.max(asked, axis=0) < 0:
            sum_choices(tl.zeros([BLOCK_OUT, BLOCK_K], tl.float32), *rest, H, K, HAS_BIAS, BLOCK_K)
            return
    # Masks, not a branch, keep absent choices from being read.
    slot = tl.load(slots + choices, mask=ks < K, other=-1).to(tl.int64)
    base = tl.maximum(slot, 0) * down_stride
    active = slot >= 0

    if TRANSPOSED:
        columns = base[:, None, None] + outputs[None, None, :]  # [BLOCK_K, 1, BLOCK_OUT]
        column_mask = active[:, None, None] & (outputs < H)[None, None, :]
        acc = tl.zeros([BLOCK_K, BLOCK_IN, BLOCK_OUT], tl.float32)
        for start in tl.range(0, I, BLOCK_IN, num_stages=NUM_STAGES):
            inputs = start + tl.arange(0, BLOCK_IN)
            v_mask = active[:, None] & (inputs < I)[None, :]
            v_at = choices[:, None] * I + inputs[None, :]
            v = tl.load(intermediate + v_at, mask=v_mask, other=0.0).to(tl.float32)
            w_mask = column_mask & (inputs < I)[None, :, None]
            w_at = columns + (inputs * H)[None, :, None]
            w = tl.load(down + w_at, mask=w_mask, other=0.0)
            acc += w.to(tl.float32) * v[:, :, None]
        computed = tl.trans(tl.sum(acc, axis=1))
    else:
        rows = base[None, :, None] + (outputs * I)[:, None, None]  # [BLOCK_OUT, BLOCK_K, 1]
        row_mask = active[None, :, None] & (outputs < H)[:, None, None]
        acc = tl.zeros([BLOCK_OUT, BLOCK_K, BLOCK_IN], tl.float32)
        if tl.max(slot, axis=0) >= 0:
            for start in tl.range(0, I, BLOCK_IN, num_stages=NUM_STAGES):
                inputs = start + tl.arange(0, BLOCK_IN)[None, None, :]
                v_mask = active[None, :, None] & (inputs < I)
                v = tl.load(
                    intermediate + choices[None, :, None] * I + inputs, mask=v_mask, other=0.0
                )
                w_mask = row_mask & (inputs < I)
                w = tl.load(down + rows + inputs, mask=w_mask, other=0.0)
                acc += w.to(tl.float32) * v.to(tl.float32)
        computed = tl.sum(acc, axis=2)  # [BLOCK_OUT, BLOCK_K]

    sum_choices(computed, *rest, H, K, HAS_BIAS, BLOCK_K)
