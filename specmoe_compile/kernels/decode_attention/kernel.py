"""Triton kernels of `decode_attention`: the range that a mask lets through, attention, a sum.

`attended_range_kernel` runs once per mask and step, and tells the others which keys count. The
attention is split over the keys: a program holds all queries that share a head of keys and values,
and takes an equal part of the range, whatever its length, so that nothing is read beyond it and a
captured launch serves every length. Parts are combined by `sum_parts_kernel`; a short cache is one
part and needs no second launch.

Rounding: scores, softmax and sums in fp32; products of float32 without tf32; the probabilities,
not yet divided by their sum, are rounded to the dtype of the values.

Shape letters: B sequences, N query heads, G heads of keys and values, Q new tokens, S cache
length, D head size, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attended_range_kernel(
    mask,
    bounds,
    stride_b,
    stride_h,
    stride_q,
    H: tl.constexpr,
    Q: tl.constexpr,
    S,
    lowest,
    IS_BOOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """bounds[b] = first, one past the last key that any query attends to; grid (B,).

    Args:
        mask: [B, H, Q, S] bool or float, keys adjacent; bounds: [B, 2] int32.
        lowest: an additive mask's value that lets nothing through, or one above it.
    """
    sequence = tl.program_id(0).to(tl.int64)
    first = S
    last = 0
    for row in range(H * Q):
        start = mask + sequence * stride_b + (row // Q) * stride_h + (row % Q) * stride_q
        row_first = S
        row_last = 0
        for offset in range(0, S, BLOCK):
            keys = offset + tl.arange(0, BLOCK)
            value = tl.load(start + keys, mask=keys < S, other=0)
            if IS_BOOL:
                attended = (value != 0) & (keys < S)
            else:
                attended = (value.to(tl.float32) > lowest) & (keys < S)
            row_first = tl.minimum(row_first, tl.min(tl.where(attended, keys, S), axis=0))
            row_last = tl.maximum(row_last, tl.max(tl.where(attended, keys + 1, 0), axis=0))
        if not IS_BOOL:
            # Such a query averages over all keys.
            averages = row_last == 0
            row_first = tl.where(averages, 0, row_first)
            row_last = tl.where(averages, S, row_last)
        first = tl.minimum(first, row_first)
        last = tl.maximum(last, row_last)
    tl.store(bounds + sequence * 2, tl.minimum(first, last))
    tl.store(bounds + sequence * 2 + 1, last)


@triton.jit
def _part_tiles(bounds, parts, BLOCK_N: tl.constexpr):
    """First key, one past the last, and keys per part, of the sequence that `bounds` points at."""
    first = tl.load(bounds)
    last = tl.load(bounds + 1)
    tiles = tl.cdiv(last - first, BLOCK_N)
    return first, last, tl.cdiv(tiles, parts) * BLOCK_N


@triton.jit
def decode_attention_kernel(
    q,
    k,
    v,
    mask,
    bounds,
    sinks,
    out,
    part_out,
    part_max,
    part_sum,
    scale,
    q_b,
    q_h,
    q_q,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    mask_b,
    mask_h,
    mask_q,
    bounds_b,
    out_b,
    out_h,
    out_q,
    parts,
    G: tl.constexpr,
    REPEATS: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr,
    MASK_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of the queries of one head of keys over one part of the range; grid (P, B * G).

    Args:
        q: [B, N, Q, D]; k, v: [B, G, S, D]; mask: [B, N, Q, S]; out: [B, N, Q, D]: strides given,
            the last one is 1. bounds: [B, 2] int32. sinks: [N].
        part_out: [B * N * Q, P, D], part_max, part_sum: [B * N * Q, P] fp32; written with SPLIT;
            of a part without keys, a maximum of -inf alone. `out` is written without.
        parts: P.
        MASK_PER_ROW: the mask differs between heads or queries.
    """
    part = tl.program_id(0)
    group = tl.program_id(1)
    sequence = (group // G).to(tl.int64)
    kv_head = (group % G).to(tl.int64)
    first, last, per_part = _part_tiles(bounds + sequence * bounds_b, parts, BLOCK_N)
    start = first + part * per_part
    end = tl.minimum(start + per_part, last)
    rows = tl.arange(0, BLOCK_M)
    row_exists = rows < REPEATS * Q
    head = kv_head * REPEATS + rows // Q
    query = rows % Q
    places = ((sequence * G * REPEATS + head) * Q + query) * parts + part
    if SPLIT:  # noqa: SIM102  (a constant of the compiler beside a value of the GPU)
        if start >= end:
            tl.store(part_max + places, float("-inf"), mask=row_exists)
            return

    dims = tl.arange(0, BLOCK_D)
    exists = row_exists[:, None] & (dims < D)[None, :]
    q_rows = q + sequence * q_b + head * q_h + query * q_q
    q_tile = tl.load(q_rows[:, None] + dims[None, :], mask=exists, other=0.0)

    k_base = k + sequence * k_b + kv_head * k_h
    v_base = v + sequence * v_b + kv_head * v_h
    mask_base = mask + sequence * mask_b
    mask_rows = mask_base + head * mask_h + query * mask_q
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for offset in range(start, end, BLOCK_N):
        keys = offset + tl.arange(0, BLOCK_N)
        inside = keys < end
        tile = inside[:, None] & (dims < D)[None, :]
        key = keys.to(tl.int64)[:, None]
        k_tile = tl.load(k_base + key * k_s + dims[None, :], mask=tile, other=0.0)
        v_tile = tl.load(v_base + key * v_s + dims[None, :], mask=tile, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        if MASK_PER_ROW:
            seen = row_exists[:, None] & inside[None, :]
            let = tl.load(mask_rows[:, None] + keys[None, :], mask=seen, other=0)
        else:
            let = tl.load(mask_base + keys, mask=inside, other=0)[None, :]
        if MASK_IS_BOOL:
            scores = tl.where((let != 0) & inside[None, :], scores, float("-inf"))
        else:
            scores = tl.where(inside[None, :], scores + let.to(tl.float32), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has met no key yet has no finite maximum to subtract.
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(scores - safe[:, None])
        rescale = tl.exp(largest - safe)
        total = total * rescale + tl.sum(weights, axis=1)
        sum_v = sum_v * rescale[:, None]
        sum_v += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        largest = new_largest

    if SPLIT:
        tl.store(part_max + places, largest, mask=row_exists)
        tl.store(part_sum + places, total, mask=row_exists)
        tl.store(part_out + places[:, None] * D + dims[None, :], sum_v, mask=exists)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=row_exists, other=0.0).to(tl.float32)
            with_sink = tl.maximum(largest, sink)
            rescale = tl.exp(largest - with_sink)
            sum_v = sum_v * rescale[:, None]
            total = total * rescale + tl.exp(sink - with_sink)
        # A row without a key has sums of zero.
        value = sum_v / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows = out + sequence * out_b + head * out_h + query * out_q
        tl.store(out_rows[:, None] + dims[None, :], value.to(out.dtype.element_ty), mask=exists)


@triton.jit
def sum_parts_kernel(
    part_out,
    part_max,
    part_sum,
    sinks,
    out,
    out_b,
    out_h,
    out_q,
    parts,
    N: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = the parts of a query's attention, put together; grid (B * N * Q,).

    Nothing that is loaded depends on another load, so that a step waits for memory once.

    Args:
        see `decode_attention_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    sequence = row // (N * Q)
    head = row // Q % N
    dims = tl.arange(0, BLOCK_D)
    largest = float("-inf")
    total = 0.0
    if HAS_SINKS:
        largest = tl.load(sinks + head).to(tl.float32)
        total = 1.0
    value = tl.zeros([BLOCK_D], tl.float32)
    for offset in range(0, parts, BLOCK_P):
        part = offset + tl.arange(0, BLOCK_P)
        place = row * parts + part
        exists = part < parts
        maxima = tl.load(part_max + place, mask=exists, other=float("-inf"))
        sums = tl.load(part_sum + place, mask=exists, other=0.0)
        tile = exists[:, None] & (dims < D)[None, :]
        values = tl.load(part_out + place[:, None] * D + dims[None, :], mask=tile, other=0.0)
        # What a part without keys left out may be anything.
        has_keys = maxima > float("-inf")
        sums = tl.where(has_keys, sums, 0.0)
        values = tl.where(has_keys[:, None], values, 0.0)
        new_largest = tl.maximum(largest, tl.max(maxima, axis=0))
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        old, rescale = tl.exp(largest - safe), tl.exp(maxima - safe)
        total = total * old + tl.sum(sums * rescale, axis=0)
        value = value * old + tl.sum(values * rescale[:, None], axis=0)
        largest = new_largest
    value = value / tl.where(total == 0.0, 1.0, total)  # without a key both are zero
    start = out + sequence * out_b + head * out_h + row % Q * out_q
    tl.store(start + dims, value.to(out.dtype.element_ty), mask=dims < D)
