"""Products with a weight that lies in a record as codes, on the CPU.

The weight is never there as a whole in float32: a few rows at a time are dequantised and used.
Each output is a float32 sum of (value of the code in float32) x (activation), so with float32
activations the result is that of a model that was dequantised in float32, up to the order of sums.

Shape letters: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.runtime.experts.formats.weight_code import (
    WeightCode,
    WeightPlanes,
    dequantise,
)

CHUNK_WEIGHTS = 1 << 19
"""Weights that are dequantised at once: 2 MiB of float32, which stays in a core's cache."""


def packed_product(x: Tensor, planes: WeightPlanes, code: WeightCode) -> Tensor:
    """`x` times the transposed weight.

    Args:
        x: [T, K] float, any strides.
        planes: of a weight [N, K].
        code: how it is coded.

    Returns:
        [T, N] float32, contiguous.
    """
    outputs = planes.codes.shape[0]
    x = x.float()
    step = _chunk_rows(x.shape[1], code)
    if step >= outputs:
        return torch.mm(x, dequantise(planes, code).t())
    out = x.new_empty(x.shape[0], outputs)
    for first in range(0, outputs, step):
        rows = planes.rows(first, min(step, outputs - first), code)
        # A chunk of `out` is no contiguous matrix, and `mm(out=)` would copy it either way.
        out[:, first : first + step] = torch.mm(x, dequantise(rows, code).t())
    return out


def _chunk_rows(inputs: int, code: WeightCode) -> int:
    """Rows of a chunk, whole blocks of scales."""
    block = code.block[0] or 1
    return max(CHUNK_WEIGHTS // inputs // block, 1) * block
