"""Coded weights as matrices again, for the products of many tokens.

A matrix holds numbers that its dtype holds exactly, never rounded ones: what does not fit beside
the codes, such as a float32 scale beside bfloat16, stays apart as `Scales` and is multiplied into
the float32 sums of its group. nf4, whose values are float32, becomes float32.

| book | scales | matrix of a float32 model | of a bfloat16 or float16 model |
|---|---|---|---|
| e2m1 | e8m0 | the weight | bfloat16: the weight; float16: codes, scales apart |
| e2m1 | e4m3 | the weight | code times scale, the global factor apart |
| int4, int8, e4m3 | any | the weight | codes (less their zero), scales apart |
| nf4 | any | the weight | the weight in float32 |

Shape letters: S slots, C slots of a part, N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.config import ceil_div
from specmoe_compile.kernels.packed_experts.codes import (
    code_factor,
    code_zero,
    decode_scale,
    decode_words,
)
from specmoe_compile.kernels.packed_experts.launch import code_constexprs, plane_args
from specmoe_compile.runtime.experts.formats.weight_code import (
    WeightCode,
    WeightPlanes,
    decode_scales,
    spread,
)

BLOCK_OUT = 16
BLOCK_IN = 512
NUM_WARPS = 4


class Scales(NamedTuple):
    """Factors that a matrix lacks: `values` [C, N / rows, G] float32, each for `columns` inputs.

    `columns` is K where a row has one.
    """

    values: Tensor
    rows: int
    columns: int


def folds_scales(code: WeightCode, dtype: torch.dtype) -> bool:
    """Whether code times scale is exact in `dtype`."""
    if dtype == torch.float32:
        return True
    kinds = ("e8m0", "e4m3") if dtype == torch.bfloat16 else ("e4m3",)
    return code.book == "e2m1" and code.scale in kinds


def matrix_dtype(code: WeightCode, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the matrix where activations are `dtype`."""
    return torch.float32 if code.book == "nf4" else dtype


def scales_apart(planes: WeightPlanes, code: WeightCode, dtype: torch.dtype) -> Scales | None:
    """What `expand` leaves out for a matrix of `dtype`; None where that is nothing.

    Args:
        planes: of a bank, [C, ...].
    """
    if dtype == torch.float32:
        return None
    outputs = planes.codes.shape[1]
    inputs = planes.codes.shape[2] * (2 if code.functions.bits == 4 else 1)
    if folds_scales(code, dtype):
        if planes.global_ is None:
            return None
        return Scales(planes.global_.unsqueeze(-1).contiguous(), 1, inputs)
    assert planes.scales is not None and code.scale is not None, "a coded weight has scales"
    values = decode_scales(planes.scales.contiguous(), code.scale)
    rows, columns = code.block[0] or outputs, code.block[1] or inputs
    if planes.global_ is not None:
        shape = torch.Size((*planes.global_.shape, values.shape[-1]))
        by_row = WeightCode(book=code.book, scale=code.scale, block=(code.block[0], 1))
        values = spread(values, by_row, shape) * planes.global_.unsqueeze(-1)
        rows = 1
    return Scales(values.contiguous(), rows, min(columns, inputs))


@triton.jit
def expand_kernel(
    codes,
    scales,
    zeros,
    factors,
    table,
    used,
    matrix,
    code_stride,
    scale_stride,
    zero_stride,
    factor_stride,
    N: tl.constexpr,
    LENGTH: tl.constexpr,
    BOOK: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    UNIT: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """matrix[c] = (code - zero) [* scale [* global]], of slots c that are used.

    Multiplied one after the other in float32, as the reference does.

    Grid: (C, ceil(N / BLOCK_OUT), ceil(K / BLOCK_IN)).

    Args:
        codes: [C, N, words] int32; scales, zeros: [C, N / BLOCK_ROWS, G]; factors: [C, N] float32;
            strides in elements from slot to slot. What the code has not is never followed.
        used: [C] int32, 0 for slots to leave alone.
        matrix: [C, N, K], contiguous.
        FOLD: multiply by the scale, and in float32 by the global factor.
    """
    slot = tl.program_id(0).to(tl.int64)
    if tl.load(used + slot) == 0:
        return
    PER_WORD: tl.constexpr = 4 if BOOK == "e4m3" or BOOK == "int8" else 8
    WORDS: tl.constexpr = BLOCK_IN // PER_WORD
    UNITS: tl.constexpr = BLOCK_IN // UNIT
    GROUPS: tl.constexpr = tl.cdiv(LENGTH, COLUMNS) if COLUMNS else 1
    rows = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = rows < N
    start = tl.program_id(2) * BLOCK_IN
    at = start // PER_WORD + tl.arange(0, WORDS)
    tile_mask = row_mask[:, None] & (at < LENGTH // PER_WORD)[None, :]
    code_at = (rows * (LENGTH // PER_WORD))[:, None] + at[None, :]
    words = tl.load(codes + slot * code_stride + code_at, mask=tile_mask, other=0)
    values = decode_words(words, table, BLOCK_OUT, WORDS, BOOK)
    values = tl.reshape(values, [BLOCK_OUT, UNITS, UNIT])
    units = start + tl.arange(0, UNITS) * UNIT
    unit_mask = row_mask[:, None] & (units < LENGTH)[None, :]
    scale_row = rows // BLOCK_ROWS if BLOCK_ROWS else rows * 0
    group = units // COLUMNS if COLUMNS else units * 0
    group_at = (scale_row * GROUPS)[:, None] + group[None, :]
    if HAS_ZERO:
        zero = tl.load(zeros + slot * zero_stride + group_at, mask=unit_mask, other=0)
        values -= (zero.to(tl.float32) + 1024.0)[:, :, None]
    else:
        values = (values - code_zero(BOOK)) * code_factor(BOOK)
    if FOLD:
        scale = tl.load(scales + slot * scale_stride + group_at, mask=unit_mask, other=0)
        values *= decode_scale(scale, SCALE)[:, :, None]
        if HAS_GLOBAL and matrix.dtype.element_ty == tl.float32:
            factor = tl.load(factors + slot * factor_stride + rows, mask=row_mask, other=0.0)
            values *= factor[:, None, None]
    values = tl.reshape(values, [BLOCK_OUT, BLOCK_IN])
    inputs = start + tl.arange(0, BLOCK_IN)
    place = matrix + slot * (N * LENGTH) + (rows * LENGTH)[:, None] + inputs[None, :]
    mask = row_mask[:, None] & (inputs < LENGTH)[None, :]
    tl.store(place, values.to(matrix.dtype.element_ty), mask=mask)


def launch_expand(planes: WeightPlanes, code: WeightCode, used: Tensor, matrix: Tensor) -> None:
    """Launch `expand_kernel` on the current stream; writes the slots of `matrix` that are used.

    Args:
        planes: of a bank, [C, ...].
        used: [C] int32.
        matrix: [C, N, K] of `matrix_dtype`, contiguous.
    """
    count, outputs, inputs = matrix.shape
    (codes, scales, zeros, factors, _, table), strides = plane_args(planes, None, code)
    grid = (count, ceil_div(outputs, BLOCK_OUT), ceil_div(inputs, BLOCK_IN))
    expand_kernel[grid](
        codes,
        scales,
        zeros,
        factors,
        table,
        used,
        matrix,
        *strides[:4],
        **expand_constexprs(outputs, inputs, code, matrix.dtype),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def expand_constexprs(
    outputs: int, inputs: int, code: WeightCode, dtype: torch.dtype
) -> dict[str, object]:
    """Compile-time arguments of `expand_kernel` for a matrix of `dtype`."""
    return {
        "N": outputs,
        "LENGTH": inputs,
        **code_constexprs(code, inputs),
        "FOLD": folds_scales(code, dtype),
        "BLOCK_OUT": BLOCK_OUT,
        "BLOCK_IN": BLOCK_IN,
    }
