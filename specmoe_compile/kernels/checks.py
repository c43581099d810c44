"""Checks that every op of `specmoe_kernels` makes of its arguments, real and fake alike.

A wrong argument is refused with one sentence: op, argument, what was got, what was expected. The
checks read shapes, dtypes, strides and devices only, so that they also run on fake tensors, and
never values, so that they never wait for a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.errors import SpecMoEError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    *,
    like: Tensor | None = None,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor of the wrong shape, dtype, device or layout.

    Args:
        shape: one entry per dimension, a number that must match or a letter that names any size.
        dtypes: those accepted.
        like: a tensor on whose device this one must be.
        contiguous: whether the tensor must be contiguous.

    Raises:
        TypeError: the dtype is not one of `dtypes`.
        ValueError: shape, device or layout is wrong.
    """
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"specmoe_kernels::{op}: {name} is {got}, expected {expected}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(expected, str) or size == expected
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(
            f"specmoe_kernels::{op}: {name} is {tuple(tensor.shape)}, expected [{wanted}]"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"specmoe_kernels::{op}: {name} is on {tensor.device}, expected {like.device} where"
            " the other tensors are"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"specmoe_kernels::{op}: {name} is not contiguous (strides {tensor.stride()}), call"
            " .contiguous() on it first"
        )


def check_bank(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    *,
    like: Tensor | None = None,
) -> None:
    """Refuse a bank view that is not [S, ...] with each slot contiguous.

    The stride from one slot to the next is free: other tensors of the record lie between.
    """
    check_tensor(op, name, tensor, shape, dtypes, like=like, contiguous=False)
    inner = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != inner:
            raise ValueError(
                f"specmoe_kernels::{op}: each slot of {name} must be contiguous, its strides are"
                f" {tensor.stride()}"
            )
        inner *= size


def require_triton(op: str) -> None:
    """Raise `SpecMoEError` where Triton cannot be imported; CUDA tensors need it."""
    if importlib.util.find_spec("triton") is None:
        raise SpecMoEError(
            f"specmoe_kernels::{op}: CUDA tensors need Triton 3.6 or newer, which is not installed;"
            " install the extra `specmoe-compile[triton]` or keep the tensors on the CPU"
        )
