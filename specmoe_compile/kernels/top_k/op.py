"""Op `top_k`: the largest scores of each row and where they are.

`torch.topk` takes two launches and 9 us of a decode step on an H200, whatever the size; a lookahead
router is in the step's way for that long. This is one small launch.

Shape letters: T rows, E scores, K of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import FLOAT_DTYPES, check_tensor, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY, implement
from specmoe_compile.kernels.top_k.reference import top_k_reference

_NAME = "top_k"
LIBRARY.define(f"{_NAME}(Tensor scores, int k) -> (Tensor, Tensor)")

MAX_SCORES = 512
MAX_K = 32


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K largest of each row, largest first; of equal ones the first come first.

    Args:
        scores: [T, E] float, E at most MAX_SCORES. Where NaNs go is not defined.
        k: K, from 1 to E and at most MAX_K.

    Returns:
        values [T, K] in the dtype of `scores`, and their places [T, K] int64; both contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or size.
        SpecMoEError: CUDA tensors without Triton.
    """
    values, places = torch.ops.specmoe_kernels.top_k(scores, k)
    return values, places


def _check(scores: Tensor, k: int) -> None:
    check_tensor(_NAME, "scores", scores, ("T", "E"), FLOAT_DTYPES, contiguous=False)
    if scores.shape[1] > MAX_SCORES:
        raise ValueError(
            f"specmoe_kernels::{_NAME}: scores has {scores.shape[1]} columns, expected at most"
            f" {MAX_SCORES}"
        )
    if not 1 <= k <= min(scores.shape[1], MAX_K):
        raise ValueError(
            f"specmoe_kernels::{_NAME}: k is {k}, expected 1 to {min(scores.shape[1], MAX_K)}"
        )


def _fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(scores, k)
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def _cpu(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(scores, k)
    return top_k_reference(scores, k)


def _cuda(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    require_triton(_NAME)
    from specmoe_compile.kernels.top_k.kernel import launch_top_k

    values, places = _fake(scores, k)
    if values.numel():
        with torch.cuda.device(scores.device):
            launch_top_k(scores.contiguous(), values, places)
    return values, places


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_fake)
