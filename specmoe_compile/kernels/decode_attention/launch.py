"""Launching the kernels of `decode_attention`: from tensors to strides and constants.

Shape letters: B sequences, N query heads, Q new tokens, D head size.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from specmoe_compile.kernels.decode_attention.config import (
    AttentionConfig,
    attention_config,
    parts_block,
)
from specmoe_compile.kernels.decode_attention.kernel import (
    attended_range_kernel,
    decode_attention_kernel,
    sum_parts_kernel,
)

_MASK_BLOCK = 16384


def launch_attended_range(mask: Tensor, bounds: Tensor) -> None:
    """Launch `attended_range_kernel` on the current stream; writes `bounds`, [B, 2] int32."""
    sequences, heads, queries, length = mask.shape
    is_bool = mask.dtype == torch.bool
    block = min(_MASK_BLOCK, triton.next_power_of_2(length))
    attended_range_kernel[(sequences,)](
        mask.view(torch.uint8) if is_bool else mask,
        bounds,
        *mask.stride()[:3],
        H=heads,
        Q=queries,
        S=length,
        lowest=0.0 if is_bool else torch.finfo(mask.dtype).min,
        IS_BOOL=is_bool,
        BLOCK=block,
        num_warps=max(1, min(16, block // 1024)),
    )


def launch_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    scale: float,
    out: Tensor,
    config: AttentionConfig | None = None,
) -> None:
    """Launch one or two kernels on the current stream; writes `out`, [B, N, Q, D].

    Args:
        see `decode_attention`; the last dimension of every tensor is contiguous.
        config: other tiles than `attention_config` gives, for tests and measurements.
    """
    sequences, heads, queries, head = q.shape
    kv_heads, length = k.shape[1:3]
    repeats = heads // kv_heads
    config = config or attention_config(
        groups=sequences * kv_heads,
        rows=repeats * queries,
        length=length,
        head=head,
        itemsize=k.element_size(),
        processors=_processors(q.device),
    )
    parts, is_bool = config.parts, mask.dtype == torch.bool
    mask = mask.expand(sequences, heads if mask.shape[1] > 1 else 1, queries, length)
    head_stride = mask.stride(1) if mask.shape[1] > 1 else 0
    bounds_b = 0 if bounds.shape[0] == 1 else bounds.stride(0)
    rows = sequences * heads * queries
    workspace = (rows, parts) if parts > 1 else (0,)
    part_max, part_sum = (q.new_empty(workspace, dtype=torch.float32) for _ in range(2))
    part_out = q.new_empty((*workspace, head), dtype=torch.float32)
    common = {"Q": queries, "D": head, "HAS_SINKS": sinks is not None}
    block_d = max(16, triton.next_power_of_2(head))
    # A pointer is needed all the same.
    some_sinks = out if sinks is None else sinks
    decode_attention_kernel[(parts, sequences * kv_heads)](
        q,
        k,
        v,
        mask.view(torch.uint8) if is_bool else mask,
        bounds,
        some_sinks,
        out,
        part_out,
        part_max,
        part_sum,
        scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        mask.stride(0),
        head_stride,
        mask.stride(2),
        bounds_b,
        *out.stride()[:3],
        parts,
        SPLIT=parts > 1,
        G=kv_heads,
        REPEATS=repeats,
        MASK_IS_BOOL=is_bool,
        MASK_PER_ROW=bool(head_stride) or (queries > 1 and bool(mask.stride(2))),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **common,
    )
    if parts > 1:
        _launch_sum_parts(part_out, part_max, part_sum, some_sinks, out, BLOCK_D=block_d, **common)


def _launch_sum_parts(
    part_out: Tensor,
    part_max: Tensor,
    part_sum: Tensor,
    sinks: Tensor,
    out: Tensor,
    **constexprs: int,
) -> None:
    rows, parts = part_max.shape
    sum_parts_kernel[(rows,)](
        part_out,
        part_max,
        part_sum,
        sinks,
        out,
        *out.stride()[:3],
        parts,
        N=out.shape[1],
        BLOCK_P=parts_block(parts),
        num_warps=4,
        **constexprs,
    )


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number in Triton's interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
