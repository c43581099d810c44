"""Blending default vectors against a loop in plain torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.blend_default_vectors.kernel import launch_weighted_sum
from specmoe_compile.kernels.blend_default_vectors.op import blend_default_vectors
from specmoe_compile.kernels.blend_default_vectors.reference import (
    blend_default_vectors_reference,
)
from tests.kernels.expert_cases import DEVICE, TOLERANCES, nan_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(
    tokens: int = 3,
    experts: int = 6,
    top_k: int = 2,
    hidden: int = 40,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(DEVICE)
    weights = torch.rand(tokens, top_k, device=DEVICE).to(dtype)
    return ids, weights, torch.randn(experts, hidden, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tokens": 1, "hidden": 1},
        {"tokens": 5, "hidden": 2049, "top_k": 3},
        {"experts": 5, "top_k": 5, "hidden": 17},
        {"experts": 1, "top_k": 1, "tokens": 9},
    ],
    ids=["plain", "one_token", "odd", "k_is_e", "one_expert"],
)
def test_kernel_matches_the_reference(sizes: dict[str, int], dtype: torch.dtype) -> None:
    ids, weights, vectors = make_inputs(**sizes, dtype=dtype)
    for out_dtype in {dtype, torch.float32}:
        out = nan_like(ids.shape[0], vectors.shape[1], dtype=out_dtype)
        launch_weighted_sum(vectors, ids, weights, out)
        expected = blend_default_vectors_reference(ids, weights, vectors, out_dtype)
        torch.testing.assert_close(out, expected, **TOLERANCES[out_dtype])


def test_kernel_counts_absent_ids_as_zero() -> None:
    ids, weights, vectors = make_inputs()
    ids[0, 1] = -1
    ids[2] = -1
    out = nan_like(3, 40, dtype=torch.float32)
    launch_weighted_sum(vectors, ids, weights, out)
    expected = blend_default_vectors_reference(ids, weights, vectors, torch.float32)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])
    op_out = blend_default_vectors(ids, weights, vectors)
    torch.testing.assert_close(op_out, expected, **TOLERANCES[torch.float32])


def test_kernel_sums_outputs_in_order_without_ids() -> None:
    rows = torch.randn(3, 4, 40, device=DEVICE)
    weights = torch.rand(3, 4, device=DEVICE)
    out = nan_like(3, 40, dtype=torch.float32)
    launch_weighted_sum(rows, None, weights, out)
    ids = torch.arange(12, device=DEVICE).view(3, 4)
    expected = blend_default_vectors_reference(ids, weights, rows.view(12, 40), torch.float32)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_matches_the_reference(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    ids, weights, vectors = make_inputs(tokens=7, dtype=dtype)
    out = blend_default_vectors(ids.to(index_dtype), weights, vectors, dtype=torch.float32)
    assert out.shape == (7, 40) and out.is_contiguous() and out.dtype == torch.float32
    expected = blend_default_vectors_reference(ids, weights, vectors, torch.float32)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])
    assert blend_default_vectors(ids, weights, vectors).dtype == dtype


def test_repeated_runs_give_the_same_bits() -> None:
    ids, weights, vectors = make_inputs(tokens=5, hidden=300, dtype=torch.bfloat16)
    outs = [nan_like(5, 300, dtype=torch.bfloat16) for _ in range(3)]
    for out in outs:
        launch_weighted_sum(vectors, ids, weights, out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_op_passes_opcheck() -> None:
    op = torch.ops.specmoe_kernels.blend_default_vectors.default
    torch.library.opcheck(op, make_inputs())
    torch.library.opcheck(op, make_inputs(), {"dtype": torch.bfloat16})


def test_op_compiles_into_one_graph() -> None:
    compiled = torch.compile(lambda *args: blend_default_vectors(*args) + 1, fullgraph=True)
    inputs = make_inputs()
    torch.testing.assert_close(compiled(*inputs), blend_default_vectors(*inputs) + 1)


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    ids, weights, vectors = make_inputs()
    attempts: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (TypeError, "ids is float32, expected int64 or int32", (ids.float(), weights, vectors)),
        (ValueError, "ids is (3,), expected [T, K]", (ids[:, 0], weights, vectors)),
        (ValueError, "weights is (2, 2), expected [3, 2]", (ids, weights[1:], vectors)),
        (ValueError, "ids is not contiguous", (ids.t().contiguous().t(), weights, vectors)),
        (ValueError, "default_vectors is not contiguous", (ids, weights, vectors[:, ::2])),
        (TypeError, "default_vectors is float64", (ids, weights, vectors.double())),
    ]
    for error, message, args in attempts:
        with pytest.raises(error, match=re.escape(message)) as caught:
            blend_default_vectors(*args)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=re.escape("dtype is torch.int8, expected float32")):
        blend_default_vectors(ids, weights, vectors, dtype=torch.int8)
