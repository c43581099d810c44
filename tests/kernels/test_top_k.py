"""The largest scores of each row against a stable sort."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.top_k.kernel import launch_top_k
from specmoe_compile.kernels.top_k.op import MAX_K, MAX_SCORES, top_k
from specmoe_compile.kernels.top_k.reference import top_k_reference
from tests.kernels.expert_cases import DEVICE, nan_like

SIZES = [(1, 128, 8), (3, 32, 4), (2, 7, 7), (1, 1, 1), (5, 60, 6), (2, 512, 32), (16, 8, 2)]


def launched(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = nan_like(scores.shape[0], k, dtype=scores.dtype)
    places = torch.full((scores.shape[0], k), -7, device=DEVICE)
    launch_top_k(scores, values, places)
    return values, places


def check(scores: Tensor, k: int) -> None:
    for got in (launched(scores, k), top_k(scores, k)):
        for found, expected in zip(got, top_k_reference(scores, k), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "scores", "k"), SIZES)
def test_kernel_takes_the_largest_in_order(
    rows: int, scores: int, k: int, dtype: torch.dtype
) -> None:
    check((10 * torch.randn(rows, scores, device=DEVICE)).to(dtype), k)
    check(torch.rand(rows, scores, device=DEVICE).softmax(-1).to(dtype), k)


def test_values_are_those_of_torch() -> None:
    scores = torch.randn(4, 64, device=DEVICE)
    values, places = launched(scores, 6)
    expected = scores.topk(6)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


def test_of_equal_scores_the_first_come_first() -> None:
    for value in (0.0, -1.5, 3.0, float("inf"), float("-inf")):
        scores = torch.full((2, 40), value, device=DEVICE)
        scores[1, 10:] = 7.0
        check(scores, 12)
        values, places = launched(scores, 12)
        assert values[0].tolist() == [value] * 12 and places[0].tolist() == list(range(12))


def test_zero_has_no_sign() -> None:
    scores = torch.tensor([[-0.0, 0.0, -0.0, -1e-30, 1e-30]], device=DEVICE)
    _, places = launched(scores, 5)
    assert places.tolist() == [[4, 0, 1, 2, 3]]


def test_scores_of_any_layout_are_taken() -> None:
    scores = torch.randn(40, 6, device=DEVICE).t()
    assert not scores.is_contiguous()
    for found, expected in zip(top_k(scores, 3), top_k_reference(scores, 3), strict=True):
        assert torch.equal(found, expected) and found.is_contiguous()


def test_op_passes_opcheck() -> None:
    op = torch.ops.specmoe_kernels.top_k.default
    torch.library.opcheck(op, (torch.randn(3, 16, device=DEVICE), 4))
    torch.library.opcheck(op, (torch.randn(0, 16, device=DEVICE), 4))


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    scores = torch.randn(2, 16)
    attempts: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (TypeError, "scores is int64, expected float32", (scores.long(), 2)),
        (ValueError, "scores is (16,), expected [T, E]", (scores[0], 2)),
        (ValueError, "k is 17, expected 1 to 16", (scores, 17)),
        (ValueError, "k is 0, expected 1 to 16", (scores, 0)),
        (ValueError, f"k is 40, expected 1 to {MAX_K}", (torch.randn(1, 64), 40)),
        (ValueError, f"600 columns, expected at most {MAX_SCORES}", (torch.randn(1, 600), 2)),
    ]
    for error, message, args in attempts:
        with pytest.raises(error, match=re.escape(message)):
            top_k(*args)
