"""Op `blend_default_vectors`: what a layer's experts would add on average.

Shape letters: T tokens, E experts, K top-k, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_tensor,
    require_triton,
)
from specmoe_compile.kernels.common_torch import LIBRARY, check_routing_weights, implement

_NAME = "blend_default_vectors"
LIBRARY.define(
    f"{_NAME}(Tensor ids, Tensor weights, Tensor default_vectors, *, ScalarType? dtype=None)"
    " -> Tensor"
)


def blend_default_vectors(
    ids: Tensor,
    weights: Tensor,
    default_vectors: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weighted sum of default vectors: out[t] = sum over k of weights[t, k] * d[ids[t, k]].

    Args:
        ids: [T, K] int32 or int64, contiguous; -1 counts as a zero vector. Values are trusted on
            CUDA.
        weights: [T, K] float, contiguous.
        default_vectors: d [E, H] float, contiguous.
        dtype: of the result; that of `default_vectors` if None.

    Returns:
        [T, H]. Sums in fp32; repeated runs give the same bits.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.
        SpecMoEError: CUDA tensors without Triton.
    """
    op = torch.ops.specmoe_kernels.blend_default_vectors
    return op(ids, weights, default_vectors, dtype=dtype)


def _new_out(
    ids: Tensor, weights: Tensor, default_vectors: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """Check the arguments and return the result's buffer, uninitialised."""
    check_tensor(_NAME, "ids", ids, ("T", "K"), INDEX_DTYPES)
    check_routing_weights(_NAME, weights, ids)
    check_tensor(_NAME, "default_vectors", default_vectors, ("E", "H"), FLOAT_DTYPES, like=ids)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"specmoe_kernels::{_NAME}: dtype is {dtype}, expected float32, bfloat16 or float16"
        )
    shape = (ids.shape[0], default_vectors.shape[1])
    return default_vectors.new_empty(shape, dtype=dtype or default_vectors.dtype)


def _fake(
    ids: Tensor, weights: Tensor, default_vectors: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    return _new_out(ids, weights, default_vectors, dtype)


def _cpu(
    ids: Tensor, weights: Tensor, default_vectors: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    out = _new_out(ids, weights, default_vectors, dtype)
    rows = default_vectors[ids.clamp(min=0)].float()
    present = torch.where(ids >= 0, weights.float(), 0.0)
    return out.copy_((rows * present.unsqueeze(-1)).sum(dim=1))


def _cuda(
    ids: Tensor, weights: Tensor, default_vectors: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    require_triton(_NAME)
    from specmoe_compile.kernels.blend_default_vectors.kernel import launch_weighted_sum

    out = _new_out(ids, weights, default_vectors, dtype)
    if out.numel() == 0 or ids.shape[1] == 0:
        return out.zero_()
    with torch.cuda.device(out.device):
        launch_weighted_sum(default_vectors, ids, weights, out)
    return out


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_fake)
