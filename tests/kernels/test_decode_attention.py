"""Attention over the filled part of a cache against softmax in float32 over all of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.decode_attention.config import AttentionConfig, attention_config
from specmoe_compile.kernels.decode_attention.launch import (
    launch_attended_range,
    launch_decode_attention,
)
from specmoe_compile.kernels.decode_attention.op import (
    MAX_QUERIES,
    attended_range,
    decode_attention,
)
from specmoe_compile.kernels.decode_attention.reference import (
    attended_range_reference,
    decode_attention_reference,
)
from tests.kernels.expert_cases import DEVICE, nan_like

TOLERANCE = {
    # Sums of at most a few hundred products in another order.
    torch.float32: 1e-5,
    # Probabilities and outputs are rounded to 8 bits, and to 11.
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
# Sequences, query heads, heads of keys, new tokens, cache length, head size.
SHAPES = [
    (1, 8, 2, 1, 300, 64),
    (2, 6, 6, 1, 97, 32),
    (3, 2, 1, 5, 70, 24),
    (1, 32, 4, 1, 40, 128),
    (1, 2, 2, 16, 33, 16),
    (8, 2, 2, 2, 20, 80),
    (1, 1, 1, 1, 1, 16),
]

IN_EVERY_DTYPE = (SHAPES[1], SHAPES[2])


def static_mask(sequences: int, queries: int, length: int, filled: int, *, padded: int = 0) -> Any:
    """What transformers makes for a static cache of which `filled` keys count, [B, 1, Q, S]."""
    keys = torch.arange(length, device=DEVICE)
    last = torch.arange(filled - queries, filled, device=DEVICE)
    mask = (keys <= last[:, None]).expand(sequences, 1, queries, length).clone()
    if padded:
        mask[0, :, :, :padded] = False
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as transformers' eager attention takes it."""
    lowest = torch.finfo(dtype).min
    return torch.where(mask, torch.zeros((), dtype=dtype, device=DEVICE), lowest)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; what no query may read is NaN in the tests that say how much is filled."""
    sequences, heads, kv_heads, queries, length, head = shape
    q = torch.randn(sequences, queries, heads, head, device=DEVICE).to(dtype).transpose(1, 2)
    k, v = (
        torch.randn(sequences, kv_heads, length, head, device=DEVICE).to(dtype) for _ in range(2)
    )
    return q, k, v


def launched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    sinks: Tensor | None = None,
    *,
    config: AttentionConfig | None = None,
) -> Tensor:
    bounds = torch.full((mask.shape[0], 2), -7, dtype=torch.int32, device=DEVICE)
    launch_attended_range(mask, bounds)
    assert torch.equal(bounds, attended_range_reference(mask))
    out = nan_like(*q.shape, dtype=q.dtype)
    launch_decode_attention(q, k, v, mask, bounds, sinks, 0.3, out, config)
    return out


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None = None) -> None:
    """The kernels, in one part and in several, and the op against the reference."""
    expected = decode_attention_reference(q, k.nan_to_num(), v.nan_to_num(), mask, sinks, 0.3)
    tolerance = TOLERANCE[q.dtype]
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    block_m = max(16, 1 << (rows - 1).bit_length())
    for parts in (1, 3):
        config = AttentionConfig(block_m, 16, parts, num_warps=4, num_stages=2)
        got = launched(q, k, v, mask, sinks, config=config)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    by_op = decode_attention(q, k, v, mask, attended_range(mask), sinks, 0.3)
    torch.testing.assert_close(by_op, expected, rtol=tolerance, atol=tolerance)
    assert by_op.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(
            shape,
            dtype,
            id=f"{shape}-{dtype}",
            # A dtype changes what is loaded and stored, a shape what is looped over: every shape in
            # float32, and each other dtype where heads are shared and where queries are several.
            marks=() if dtype == torch.float32 or shape in IN_EVERY_DTYPE else pytest.mark.slow,
        )
        for shape in SHAPES
        for dtype in TOLERANCE
    ],
)
def test_attention_over_a_filled_part(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = tensors(shape, dtype)
    queries, length = shape[3:5]
    filled = max(queries, length * 2 // 3)
    # Nothing beyond the filled part is read: NaN there would show.
    k[:, :, filled:], v[:, :, filled:] = float("nan"), float("nan")
    mask = static_mask(shape[0], queries, length, filled)
    check(q, k, v, mask)
    check(q, k, v, additive(mask, dtype))


@pytest.mark.parametrize("filled", [1, 15, 16, 17, 47, 48, 64])
def test_every_filled_length_is_split_without_gaps(filled: int) -> None:
    q, k, v = tensors((1, 4, 2, 1, 64, 16), torch.float32)
    check(q, k, v, static_mask(1, 1, 64, filled))


def test_padding_and_windows_are_left_out_exactly() -> None:
    q, k, v = tensors((2, 4, 2, 1, 60, 16), torch.float32)
    mask = static_mask(2, 1, 60, 50, padded=7)
    check(q, k, v, mask)
    window = mask & (torch.arange(60, device=DEVICE) > 35)
    k[:, :, :35], v[:, :, :35] = float("nan"), float("nan")
    check(q, k, v, window)
    holes = window & (torch.arange(60, device=DEVICE) % 3 != 0)
    check(q, k, v, holes)
    check(q, k, v, additive(holes, torch.float32))


def test_sinks_take_part_in_the_softmax() -> None:
    q, k, v = tensors((2, 4, 2, 3, 40, 16), torch.float32)
    mask = static_mask(2, 3, 40, 30)
    for sinks in (torch.randn(4, device=DEVICE), torch.full((4,), 30.0, device=DEVICE)):
        check(q, k, v, mask, sinks)
        check(q, k, v, additive(mask, torch.float32), sinks)
    without = launched(q, k, v, mask)
    assert not torch.allclose(without, launched(q, k, v, mask, torch.ones(4, device=DEVICE)))


def test_a_bias_per_head_and_query_is_added() -> None:
    q, k, v = tensors((2, 4, 2, 3, 40, 16), torch.float32)
    check(q, k, v, torch.randn(2, 4, 3, 40, device=DEVICE))
    check(q, k, v, torch.randn(1, 4, 1, 40, device=DEVICE))
    check(q, k, v, torch.randn(1, 1, 3, 40, device=DEVICE))


def test_a_query_that_attends_to_nothing() -> None:
    q, k, v = tensors((2, 2, 1, 2, 24, 16), torch.float32)
    mask = static_mask(2, 2, 24, 20)
    mask[0, :, 0] = False
    assert launched(q, k, v, mask)[0, :, 0].eq(0).all()
    # An additive mask of lowest values is an average over all keys.
    check(q, k, v, additive(mask, torch.float32))
    mask[0] = False
    assert attended_range(mask)[0].tolist() == [0, 0]
    check(q, k, v, mask)
    check(q, k, v, mask, torch.zeros(2, device=DEVICE))


def test_one_mask_serves_every_sequence() -> None:
    q, k, v = tensors((3, 2, 1, 1, 40, 16), torch.float32)
    check(q, k, v, static_mask(1, 1, 40, 30))


def test_views_of_caches_are_read_where_they_lie() -> None:
    q, k, v = tensors((2, 4, 2, 1, 40, 16), torch.float32)
    wide = torch.randn(2, 40, 2, 48, device=DEVICE)
    k, v = wide[..., :16].transpose(1, 2), wide[..., 16:32].transpose(1, 2)
    mask = static_mask(2, 1, 48, 30)[..., :40]
    assert not (k.is_contiguous() or mask.is_contiguous())
    check(q, k, v, mask)


def test_parts_fill_the_gpu_and_no_more_than_the_cache() -> None:
    def parts(length: int, groups: int = 4) -> int:
        config = attention_config(
            groups=groups, rows=8, length=length, head=128, itemsize=2, processors=132
        )
        return config.parts

    assert parts(65536) == 66 and parts(65536, groups=32) == 8 and parts(65536, groups=999) == 1
    assert parts(1024) == 16 and parts(257) == 5 and parts(256) == 1


def test_ops_pass_opcheck() -> None:
    q, k, v = tensors((2, 4, 2, 1, 40, 16), torch.float32)
    mask = static_mask(2, 1, 40, 30)
    bounds = attended_range(mask)
    torch.library.opcheck(torch.ops.specmoe_kernels.attended_range.default, (mask,))
    op = torch.ops.specmoe_kernels.decode_attention.default
    torch.library.opcheck(op, (q, k, v, mask, bounds, None, 0.25))
    torch.library.opcheck(op, (q, k, v, mask, bounds, torch.ones(4, device=DEVICE), 0.25))
    torch.library.opcheck(op, (q[:0], k[:0], v[:0], mask[:1], bounds[:1], None, 0.25))


def test_wrong_arguments_are_refused_with_one_sentence() -> None:
    q, k, v = (tensor.cpu() for tensor in tensors((2, 4, 2, 1, 40, 16), torch.float32))
    mask = static_mask(2, 1, 40, 30).cpu()
    bounds = attended_range(mask)
    long = torch.zeros(2, 4, MAX_QUERIES + 1, 16)
    attempts: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (TypeError, "k is bfloat16, expected float32", (q, k.bfloat16(), v, mask, bounds)),
        (ValueError, "v is (2, 2, 39, 16)", (q, k, v[:, :, 1:], mask, bounds)),
        (ValueError, "and 40 keys", (q, k, v, mask[..., 1:], bounds)),
        (ValueError, "bounds is (1, 2), expected [2, 2]", (q, k, v, mask, bounds[:1])),
        (TypeError, "mask is int64", (q, k, v, mask.long(), bounds)),
        (ValueError, "expected a multiple of those", (q[:, :3], k, v, mask, bounds)),
        (ValueError, f"{MAX_QUERIES} tokens", (long, k, v, mask, bounds)),
    ]
    for error, message, args in attempts:
        with pytest.raises(error, match=re.escape(message)):
            decode_attention(*args, None, 0.25)
    with pytest.raises(ValueError, match=re.escape("expected [B, N, Q, S]")):
        attended_range(mask[0])
