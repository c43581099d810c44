"""Triton kernel of `top_k`: one warp holds a row and takes its largest score K times.

Shape letters: T rows, E scores, K of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A key holds a score, as an integer of the same order, above its place, counted down:
# of equal scores the first has the largest key.
PLACE_BITS = tl.constexpr(9)
LAST_PLACE = tl.constexpr(511)
NO_KEY = tl.constexpr(-(2**63))
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def top_k_kernel(
    scores,
    values,
    places,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """values[t], places[t] = the K largest of scores[t], largest first; grid (T,).

    Args:
        scores: [T, E] float; values: [T, K], dtype of scores; places: [T, K] int64. Contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_E)
    score = tl.load(scores + row * E + columns, mask=columns < E, other=0.0).to(tl.float32)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    # Integers of negative floats grow with their magnitude.
    order = tl.where(bits < 0, bits ^ MAGNITUDE, bits)
    key = (order.to(tl.int64) << PLACE_BITS) | (columns ^ LAST_PLACE)
    key = tl.where(columns < E, key, NO_KEY)

    ks = tl.arange(0, BLOCK_K)
    best_keys = tl.full([BLOCK_K], NO_KEY, tl.int64)
    for k in tl.static_range(K):
        best = tl.max(key, axis=0)
        best_keys = tl.where(ks == k, best, best_keys)
        key = tl.where(key == best, NO_KEY, key)

    order = (best_keys >> PLACE_BITS).to(tl.int32)
    bits = tl.where(order < 0, order ^ MAGNITUDE, order)
    value = bits.to(tl.float32, bitcast=True).to(values.dtype.element_ty)
    tl.store(values + row * K + ks, value, mask=ks < K)
    tl.store(places + row * K + ks, (best_keys & LAST_PLACE) ^ LAST_PLACE, mask=ks < K)


def block_sizes(scores: int, k: int) -> tuple[int, int]:
    """BLOCK_E and BLOCK_K: at least one score for each thread of a warp."""
    return max(32, triton.next_power_of_2(scores)), triton.next_power_of_2(k)


def launch_top_k(scores: Tensor, values: Tensor, places: Tensor) -> None:
    """Launch `top_k_kernel` on the current stream; writes `values` and `places`, [T, K]."""
    rows, count = scores.shape
    block_e, block_k = block_sizes(count, values.shape[1])
    top_k_kernel[(rows,)](
        scores,
        values,
        places,
        E=count,
        K=values.shape[1],
        BLOCK_E=block_e,
        BLOCK_K=block_k,
        num_warps=1,
        num_stages=1,
    )
