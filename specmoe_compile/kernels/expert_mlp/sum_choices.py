"""Triton function at the end of `down_kernel`: each choice's output, wherever it is, and their sum.

Shape letters: T tokens, K top-k, H hidden, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_choices(
    computed,
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
    H: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Complete the choices that are computed now, find the others, sum and store.

    Tiles are [BLOCK_OUT, BLOCK_K].

    Args:
        computed: [BLOCK_OUT, BLOCK_K] fp32, without a bias; anything where the slot is -1.
        token: row of this program; outputs: [BLOCK_OUT] columns; the rest as in `down_kernel`.
    """
    ks = tl.arange(0, BLOCK_K)
    choices = token * K + ks
    # Slots are read again, by a load that is not merged with the first: masks kept over the loop
    # cost Triton 3.6 a quarter of the registers, and a spill.
    slot = tl.load(slots + choices, mask=ks < K, other=-1, cache_modifier=".ca").to(tl.int64)
    is_now = (slot >= 0)[None, :]
    mask = (outputs < H)[:, None] & (ks < K)[None, :]
    if HAS_BIAS:
        bias_at = (tl.maximum(slot, 0) * bias_stride)[None, :] + outputs[:, None]
        bias = tl.load(down_bias + bias_at, mask=mask & is_now, other=0.0)
        computed += bias.to(tl.float32)
    skip = tl.load(skipped + choices, mask=ks < K * read_skipped, other=-1).to(tl.int64)
    is_default = ((slot < 0) & (skip >= 0))[None, :]
    is_earlier = ((slot < 0) & (skip < 0) & (ks < K * read_partial))[None, :]
    places = choices[None, :] * H + outputs[:, None]
    earlier = tl.load(partial + places, mask=mask & is_earlier, other=0.0)
    default_at = (tl.maximum(skip, 0) * H)[None, :] + outputs[:, None]
    default = tl.load(default_vectors + default_at, mask=mask & is_default, other=0.0)

    found = tl.where(is_now, computed.to(partial.dtype.element_ty), earlier)
    tl.store(y + places, found, mask=mask & (ks < K * store_y)[None, :])
    value = tl.where(is_default, default, found.to(tl.float32))
    weight = tl.load(weights + choices, mask=ks < K, other=0.0).to(tl.float32)
    total = tl.sum(weight[None, :] * value, axis=1)
    tl.store(out + token * H + outputs, total.to(out.dtype.element_ty), mask=outputs < H)
