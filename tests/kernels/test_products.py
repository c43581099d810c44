"""One token times several weights in one launch, against sums in float32."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.products.config import products_config
from specmoe_compile.kernels.products.kernel import launch_products
from specmoe_compile.kernels.products.op import products
from specmoe_compile.kernels.products.reference import products_reference
from tests.kernels.expert_cases import DEVICE, nan_like

# Outputs of each weight, and inputs: odd ones, one weight and four, more inputs than a block has.
SIZES = [((7, 5, 3), 64), ((1,), 300), ((40, 8, 8, 16), 128), ((33, 2), 2880), ((3, 0, 4), 4100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    sizes: tuple[int, ...], inputs: int, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(1, inputs, device=DEVICE).to(dtype)
    weights = [(torch.randn(n, inputs, device=DEVICE) / inputs**0.5).to(dtype) for n in sizes]
    biases = [torch.randn(n, device=DEVICE).to(dtype) for n in sizes] if bias else []
    return x, weights, biases


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "inputs"), SIZES)
def test_each_weight_has_its_product(
    sizes: tuple[int, ...], inputs: int, dtype: torch.dtype, bias: bool
) -> None:
    x, weights, biases = case(sizes, inputs, dtype, bias)
    launched = [nan_like(1, n, dtype=dtype) for n in sizes]
    launch_products(x, weights, biases, launched)
    # Sums of up to 4,100 terms of size 1 / sqrt(I) in another order, then rounded once.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-5 + torch.finfo(dtype).eps}
    for got in (launched, products(x, weights, biases)):
        for found, expected in zip(got, products_reference(x, weights, biases), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "inputs", "bias"),
    [
        ((4096, 512, 512), 2048, False),
        ((2048,), 4096, False),
        ((128,), 2048, False),
        ((4096, 512, 512), 2880, True),
        ((2880,), 4096, True),
        ((32,), 2880, True),
    ],
)
def test_products_of_models_are_the_same_in_every_run(
    sizes: tuple[int, ...], inputs: int, bias: bool
) -> None:
    x, weights, biases = case(sizes, inputs, torch.bfloat16, bias)
    first = products(x, weights, biases)
    for found, expected in zip(first, products_reference(x, weights, biases), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products(x, weights, biases)
    for _ in range(20):
        graph.replay()
        for again, found in zip(captured, first, strict=True):
            assert torch.equal(again, found)


def test_a_weight_of_a_prompt_or_of_a_head_has_enough_programs() -> None:
    few, many = products_config([128], 2048, 2), products_config([4096, 512, 512], 2048, 2)
    assert (few.block_out, many.block_out) == (1, 4)
    long = products_config([2880], 4096, 2)
    assert (long.block_out, long.block_in) == (8, 512)


def test_op_passes_opcheck() -> None:
    op = torch.ops.specmoe_kernels.products.default
    x, weights, biases = case((7, 5), 64, torch.float32, True)
    torch.library.opcheck(op, (x, weights, biases))
    torch.library.opcheck(op, (x, weights, []))


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    x, weights, biases = case((7, 5), 64, torch.float32, True)
    attempts: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "x is (2, 64), expected [1, I]", (torch.cat([x, x]), weights, [])),
        (TypeError, "a weight is float64, expected float32", (x, [weights[0].double()], [])),
        (ValueError, "a weight is (7, 32), expected [N, 64]", (x, [weights[0][:, :32]], [])),
        (ValueError, "5 weights, expected 1 to 4", (x, weights[:1] * 5, [])),
        (ValueError, "0 weights, expected 1 to 4", (x, [], [])),
        (ValueError, "1 biases for 2 weights", (x, weights, biases[:1])),
        (ValueError, "a bias is (5,), expected [7]", (x, weights, biases[::-1])),
    ]
    for error, message, args in attempts:
        with pytest.raises(error, match=re.escape(message)):
            products(*args)
