"""Op `products`: one token times several weights, in one launch.

A token's q, k, v and o, the router and other small products take cuBLAS 4.6 to 8.6 us each on an
H200, several times what reading the weights takes, and a launch each.

Shape letters: N outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import FLOAT_DTYPES, check_tensor, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY, implement
from specmoe_compile.kernels.products.reference import products_reference

_NAME = "products"
LIBRARY.define(f"{_NAME}(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]")

MAX_WEIGHTS = 4
MAX_OUTPUTS = 32768
"""Larger ones, such as the head of a model, take cuBLAS as long as reading them takes."""


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> list[Tensor]:
    """One token times each of up to `MAX_WEIGHTS` weights, plus biases.

    Args:
        x: [1, I], float32, bfloat16 or float16, contiguous.
        weights: [N, I] each, N of its own, dtype of x, contiguous.
        biases: none, or [N] of each weight, dtype of x, contiguous.

    Returns:
        [1, N] of each weight, dtype of x: summed in float32, rounded once.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, number or layout.
        SpecMoEError: CUDA tensors without Triton.
    """
    found: list[Tensor] = torch.ops.specmoe_kernels.products(x, list(weights), list(biases))
    return found


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    check_tensor(_NAME, "x", x, (1, "I"), FLOAT_DTYPES)
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(
            f"specmoe_kernels::{_NAME}: {len(weights)} weights, expected 1 to {MAX_WEIGHTS}"
        )
    if biases and len(biases) != len(weights):
        raise ValueError(
            f"specmoe_kernels::{_NAME}: {len(biases)} biases for {len(weights)} weights, expected"
            " none or one for each"
        )
    for weight in weights:
        check_tensor(_NAME, "a weight", weight, ("N", x.shape[1]), (x.dtype,), like=x)
    for weight, bias in zip(weights, biases, strict=False):
        check_tensor(_NAME, "a bias", bias, (weight.shape[0],), (x.dtype,), like=x)


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    _check(x, weights, biases)
    return [x.new_empty((1, weight.shape[0])) for weight in weights]


def _cpu(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    _check(x, weights, biases)
    return products_reference(x, weights, biases)


def _cuda(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    require_triton(_NAME)
    from specmoe_compile.kernels.products.kernel import launch_products

    outs = _fake(x, weights, biases)
    with torch.cuda.device(x.device):
        launch_products(x, weights, biases, outs)
    return outs


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_fake)
