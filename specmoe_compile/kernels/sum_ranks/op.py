"""Op `sum_ranks`: a small tensor plus those of the other ranks of a process group.

NCCL's all-reduce of 4 KiB goes around a ring, on a stream of its own. Here each rank writes its
part into the memory of all others at once, and adds up what has arrived, on the caller's stream.
Nothing waits on the host, so that a CUDA graph can hold it; a group needs an inbox first
(`inbox.py`). On a CPU it is an all-gather and the same sum.

All ranks take part in the same sums in the same order, as in every collective.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.kernels.checks import FLOAT_DTYPES, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY, implement
from specmoe_compile.kernels.sum_ranks.inbox import MAX_BYTES, inbox_or_none
from specmoe_compile.kernels.sum_ranks.reference import sum_ranks_reference

_NAME = "sum_ranks"
LIBRARY.define(f"{_NAME}(Tensor x, str group) -> Tensor")


def sum_ranks(x: Tensor, group: str) -> Tensor:
    """Sum of `x` over the ranks of a group, in the order of the ranks, in float32, rounded once.

    All ranks get the same bits, the same ones in every run. Of two ranks they are also those of any
    other sum that rounds once.

    Args:
        x: float32, bfloat16 or float16 of any shape, the same on all ranks; whole words of 4 bytes,
            at most MAX_BYTES.
        group: name of the process group.

    Returns:
        A new contiguous tensor like `x`.

    Raises:
        TypeError, ValueError: see `reason_against`.
        SpecMoEError: CUDA tensors without Triton, or of a group that has no inbox.
    """
    out: Tensor = torch.ops.specmoe_kernels.sum_ranks(x, group)
    return out


def reason_against(shape: tuple[object, ...], dtype: torch.dtype) -> str | None:
    """Why a tensor of this shape and dtype cannot be summed so, or None."""
    if dtype not in FLOAT_DTYPES:
        return f"it is {str(dtype).removeprefix('torch.')}, not float32, bfloat16 or float16"
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) < len(shape):
        return "its size is not known before it runs"
    size_bytes = math.prod(sizes) * dtype.itemsize
    if size_bytes % 4 or not 0 < size_bytes <= MAX_BYTES:
        return f"it has {size_bytes} bytes, expected a multiple of 4 up to {MAX_BYTES}"
    return None


def _check(x: Tensor) -> None:
    reason = reason_against(tuple(x.shape), x.dtype)
    if reason is not None:
        kind = TypeError if x.dtype not in FLOAT_DTYPES else ValueError
        raise kind(f"specmoe_kernels::{_NAME}: x cannot be summed: {reason}")


def _fake(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cpu(x: Tensor, group: str) -> Tensor:
    _check(x)
    members = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    mine = x.contiguous()
    parts = [torch.empty_like(mine) for _ in range(members.size())]
    dist.all_gather(parts, mine, group=members)
    return sum_ranks_reference(parts)


def _cuda(x: Tensor, group: str) -> Tensor:
    require_triton(_NAME)
    from specmoe_compile.kernels.sum_ranks.kernel import launch_sum_ranks

    _check(x)
    inbox = inbox_or_none(group)
    if inbox is None:
        raise SpecMoEError(
            f"specmoe_kernels::{_NAME}: the process group {group!r} has no inbox on this rank: open"
            " it on all ranks first (open_inboxes)"
        )
    mine = x.contiguous()
    if mine.data_ptr() % 4:
        mine = mine.clone()
    out = torch.empty_like(mine)
    with torch.cuda.device(x.device):
        words, sums = (each.view(-1).view(torch.int32) for each in (mine, out))
        launch_sum_ranks(words, sums, inbox, str(x.dtype).removeprefix("torch."))
    return out


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_fake)
