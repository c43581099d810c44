"""Triton kernel of `products`: a program per block of outputs, of whichever weight it belongs to.

Rounding: products and sums in float32, the result is rounded once to the dtype of x.

Shape letters: N outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.config import ceil_div
from specmoe_compile.kernels.products.config import ProductsConfig, products_config


@triton.jit
def _block_of_outputs(
    x,
    weight,
    bias,
    out,
    block,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    outputs = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = outputs < N
    rows = weight + (outputs.to(tl.int64) * I)[:, None]
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for start in tl.range(0, I, BLOCK_IN, num_stages=NUM_STAGES):
        inputs = start + tl.arange(0, BLOCK_IN)[None, :]
        v = tl.load(x + inputs, mask=inputs < I, other=0.0).to(tl.float32)
        w = tl.load(rows + inputs, mask=mask[:, None] & (inputs < I), other=0.0)
        sums += w.to(tl.float32) * v
    result = tl.sum(sums, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + outputs, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def products_kernel(
    x,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    bias_0,
    bias_1,
    bias_2,
    bias_3,
    out_0,
    out_1,
    out_2,
    out_3,
    N_0: tl.constexpr,
    N_1: tl.constexpr,
    N_2: tl.constexpr,
    N_3: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out_i = weight_i @ x + bias_i; grid: blocks of all weights, one after the other.

    Args:
        x: [I]; weight_i: [N_i, I]; bias_i, out_i: [N_i]; one dtype, contiguous. A weight that is
            not there has N_i = 0.
    """
    block = tl.program_id(0)
    ENDS_0: tl.constexpr = (N_0 + BLOCK_OUT - 1) // BLOCK_OUT
    ENDS_1: tl.constexpr = ENDS_0 + (N_1 + BLOCK_OUT - 1) // BLOCK_OUT
    ENDS_2: tl.constexpr = ENDS_1 + (N_2 + BLOCK_OUT - 1) // BLOCK_OUT
    # A branch for each: the compiler then knows of every pointer that it is aligned.
    if block < ENDS_0:
        _block_of_outputs(
            x, weight_0, bias_0, out_0, block, N_0, I, HAS_BIAS, BLOCK_OUT, BLOCK_IN, NUM_STAGES
        )
    elif block < ENDS_1:
        block -= ENDS_0
        _block_of_outputs(
            x, weight_1, bias_1, out_1, block, N_1, I, HAS_BIAS, BLOCK_OUT, BLOCK_IN, NUM_STAGES
        )
    elif block < ENDS_2:
        block -= ENDS_1
        _block_of_outputs(
            x, weight_2, bias_2, out_2, block, N_2, I, HAS_BIAS, BLOCK_OUT, BLOCK_IN, NUM_STAGES
        )
    elif N_3 > 0:
        block -= ENDS_2
        _block_of_outputs(
            x, weight_3, bias_3, out_3, block, N_3, I, HAS_BIAS, BLOCK_OUT, BLOCK_IN, NUM_STAGES
        )


def launch_products(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    outs: Sequence[Tensor],
    config: ProductsConfig | None = None,
) -> None:
    """Launch `products_kernel` on the current stream; writes `outs`, [1, N] of each weight."""
    sizes = [weight.shape[0] for weight in weights]
    inputs = x.shape[1]
    config = config or products_config(sizes, inputs, x.itemsize)
    blocks = sum(ceil_div(size, config.block_out) for size in sizes)
    if not blocks:
        return
    absent = 4 - len(weights)
    products_kernel[(blocks,)](
        x,
        *weights,
        *[x] * absent,
        *(biases or [x] * len(weights)),
        *[x] * absent,
        *outs,
        *[x] * absent,
        *sizes,
        *[0] * absent,
        I=inputs,
        HAS_BIAS=bool(biases),
        BLOCK_OUT=config.block_out,
        BLOCK_IN=config.block_in,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
