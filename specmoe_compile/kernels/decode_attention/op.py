"""Ops `attended_range` and `decode_attention`: attention over what a static cache holds so far.

A static cache is as long as it may become, and a mask says which of its keys count. PyTorch's
kernels read all of it in every step, and with a mask they want keys and values repeated to all
heads. These read the keys from the first to the last that the mask lets through, once.

The range is found on the device: nothing waits for the host, and a captured launch serves every
length. The mask is respected entry by entry inside the range as well.

Shape letters: B sequences, N query heads, G heads of keys and values, Q new tokens, S cache
length, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specmoe_compile.kernels.checks import FLOAT_DTYPES, check_tensor, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY
from specmoe_compile.kernels.decode_attention.reference import (
    attended_range_reference,
    decode_attention_reference,
)

_RANGE, _NAME = "attended_range", "decode_attention"
_SIGNATURES = {
    _RANGE: "(Tensor mask) -> Tensor",
    _NAME: (
        "(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor bounds, Tensor? sinks, float scale)"
        " -> Tensor"
    ),
}
for _op, _schema in _SIGNATURES.items():
    LIBRARY.define(_op + _schema)
    # Gets what the op's body in C++, on a CPU, leaves to Python.
    LIBRARY.define(f"{_op}_python{_schema}")

MAX_QUERIES = 16
MAX_HEAD = 256
MAX_ROWS = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
"""Query heads that share a head of keys, times new tokens: a program holds all of them. Float32 is
computed without matrix units, whose code grows with the rows."""
_MASK_DTYPES = (torch.bool, *FLOAT_DTYPES)


def attended_range(mask: Tensor) -> Tensor:
    """First and one past the last key that any query of a sequence attends to.

    Args:
        mask: [B, 1 or N, 1 or Q, S]: True, or a value above the lowest of its dtype, attends. A
            query that an additive mask lets attend to nothing averages over all keys.

    Returns:
        [B, 2] int32; both numbers are equal where nothing is attended to.

    Raises:
        TypeError, ValueError: the mask has the wrong dtype or shape.
    """
    bounds: Tensor = torch.ops.specmoe_kernels.attended_range(mask)
    return bounds


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(q k^T scale + mask) v over the keys inside `bounds`.

    Args:
        q: [B, N, Q, D] float, Q at most MAX_QUERIES, D at most MAX_HEAD.
        k, v: [B, G, S, D] of the dtype of q; N is a multiple of G, and N / G * Q at most what
            MAX_ROWS says of the dtype.
        mask: [1 or B, 1 or N, 1 or Q, S], boolean or additive. A query that a boolean mask lets
            attend to nothing gives zeros.
        bounds: `attended_range` of the mask, [1 or B, 2] int32.
        sinks: [N] float, a score of each head that takes part in its softmax and has no value.
        scale: factor of the scores.

    Returns:
        [B, N, Q, D] in the dtype of q, laid out as [B, Q, N, D].

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or size.
        SpecMoEError: CUDA tensors without Triton.
    """
    out: Tensor = torch.ops.specmoe_kernels.decode_attention(q, k, v, mask, bounds, sinks, scale)
    return out


def _check_mask(op: str, mask: Tensor) -> None:
    check_tensor(op, "mask", mask, ("B", "N", "Q", "S"), _MASK_DTYPES, contiguous=False)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bounds: Tensor, sinks: Tensor | None
) -> None:
    check_tensor(_NAME, "q", q, ("B", "N", "Q", "D"), FLOAT_DTYPES, contiguous=False)
    sequences, heads, queries, head = q.shape
    shape = (sequences, "G", "S", head)
    check_tensor(_NAME, "k", k, shape, (q.dtype,), like=q, contiguous=False)
    check_tensor(_NAME, "v", v, tuple(k.shape), (q.dtype,), like=q, contiguous=False)
    _check_mask(_NAME, mask)
    if any(
        size not in (1, wanted)
        for size, wanted in zip(mask.shape[:3], (sequences, heads, queries), strict=True)
    ) or (mask.shape[3] != k.shape[2]):
        raise ValueError(
            f"specmoe_kernels::{_NAME}: mask is {tuple(mask.shape)}, expected 1 or each of"
            f" ({sequences}, {heads}, {queries}), and {k.shape[2]} keys"
        )
    check_tensor(_NAME, "bounds", bounds, (mask.shape[0], 2), (torch.int32,), like=q)
    if sinks is not None:
        check_tensor(_NAME, "sinks", sinks, (heads,), FLOAT_DTYPES, like=q)
    max_rows = MAX_ROWS[q.dtype]
    rows = heads // k.shape[1] * queries
    if heads % k.shape[1] or rows > max_rows or queries > MAX_QUERIES or head > MAX_HEAD:
        raise ValueError(
            f"specmoe_kernels::{_NAME}: q is {tuple(q.shape)} with {k.shape[1]} heads of keys,"
            f" expected a multiple of those, at most {max_rows} queries for each, {MAX_QUERIES}"
            f" tokens and a head size of {MAX_HEAD}"
        )


def _new_output(q: Tensor) -> Tensor:
    """[B, N, Q, D] laid out so that the heads of a token are adjacent."""
    sequences, heads, queries, head = q.shape
    return q.new_empty((sequences, queries, heads, head)).transpose(1, 2)


def _range_fake(mask: Tensor) -> Tensor:
    _check_mask(_RANGE, mask)
    return mask.new_empty((mask.shape[0], 2), dtype=torch.int32)


def _range_cpu(mask: Tensor) -> Tensor:
    _check_mask(_RANGE, mask)
    return attended_range_reference(mask)


def _range_cuda(mask: Tensor) -> Tensor:
    require_triton(_RANGE)
    from specmoe_compile.kernels.decode_attention.launch import launch_attended_range

    bounds = _range_fake(mask)
    if bounds.numel():
        with torch.cuda.device(mask.device):
            launch_attended_range(_with_adjacent_last(mask), bounds)
    return bounds


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    _check(q, k, v, mask, bounds, sinks)
    return _new_output(q)


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    _check(q, k, v, mask, bounds, sinks)
    out = _new_output(q)
    if not q.numel():
        return out
    # Of sequences whose ranges differ, what any of them needs; the mask tells them apart.
    first, last = int(bounds[:, 0].min()), int(bounds[:, 1].max())
    k, v, mask = k[:, :, first:last], v[:, :, first:last], mask[..., first:last]
    if first == last:
        return out.zero_()
    if sinks is not None:
        return out.copy_(decode_attention_reference(q, k, v, mask, sinks, scale))
    return out.copy_(
        scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    )


def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    require_triton(_NAME)
    from specmoe_compile.kernels.decode_attention.launch import launch_decode_attention

    _check(q, k, v, mask, bounds, sinks)
    out = _new_output(q)
    if not q.numel():
        return out
    q, k, v, mask = (_with_adjacent_last(tensor) for tensor in (q, k, v, mask))
    with torch.cuda.device(q.device):
        launch_decode_attention(q, k, v, mask, bounds, sinks, scale, out)
    return out


def _with_adjacent_last(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


for _op, _real_cpu, _real_cuda, _shapes in (
    (_RANGE, _range_cpu, _range_cuda, _range_fake),
    (_NAME, _cpu, _cuda, _fake),
):
    # The CPU's own key is for the body in C++, `runtime/cpu/native/torch_src/ops.cpp`.
    LIBRARY.impl(_op, _real_cpu, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{_op}_python", _real_cpu, "CompositeExplicitAutograd")
    LIBRARY.impl(_op, _real_cuda, "CUDA")
    torch.library.register_fake(f"specmoe_kernels::{_op}", _shapes, lib=LIBRARY)
