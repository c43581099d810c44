"""Triton kernel of a weighted sum of rows: default vectors by expert id, or outputs by choice.

Shape letters: T tokens, E experts, K top-k, H width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def weighted_sum_kernel(
    rows,
    ids,
    weights,
    out,
    H: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] * rows[ids[t, k]], or rows[t * K + k] without GATHER.

    Grid: (T, ceil(H / BLOCK_H)). All K rows are read side by side; sums in fp32; ids below 0 count
    as zero rows. No atomics: the order of the sum is fixed.

    Args:
        rows: [N, H] float; ids: [T, K] integers; weights: [T, K] float; out: [T, H] float.
        All contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    choices = token * K + ks
    if GATHER:
        sources = tl.load(ids + choices, mask=ks < K, other=-1).to(tl.int64)
    else:
        sources = tl.where(ks < K, choices, -1)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (sources >= 0)[:, None] & (columns < H)[None, :]
    places = (tl.maximum(sources, 0) * H)[:, None] + columns[None, :]
    values = tl.load(rows + places, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weights + choices, mask=sources >= 0, other=0.0).to(tl.float32)
    total = tl.sum(values * weight[:, None], axis=0)
    tl.store(out + token * H + columns, total.to(out.dtype.element_ty), mask=columns < H)


def block_sizes(hidden: int, top_k: int, itemsize: int) -> tuple[int, int]:
    """BLOCK_K and BLOCK_H: one or two loads of 16 bytes for each of 128 threads."""
    block_k = triton.next_power_of_2(top_k)
    block_h = max(16, 4096 // itemsize // block_k)
    return block_k, min(block_h, triton.next_power_of_2(hidden))


def launch_weighted_sum(rows: Tensor, ids: Tensor | None, weights: Tensor, out: Tensor) -> None:
    """Launch `weighted_sum_kernel` on the current stream; writes `out`, [T, H].

    Args:
        ids: [T, K], or None where `rows` are [T, K, H] in order.
    """
    tokens, top_k = weights.shape
    hidden = out.shape[1]
    block_k, block_h = block_sizes(hidden, top_k, rows.element_size())
    weighted_sum_kernel[(tokens, triton.cdiv(hidden, block_h))](
        rows,
        weights if ids is None else ids,
        weights,
        out,
        H=hidden,
        K=top_k,
        GATHER=ids is not None,
        BLOCK_K=block_k,
        BLOCK_H=block_h,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
