"""Attention by the CPU engine: against float32 over all keys, the same bits however it is run."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile import backend
from specmoe_compile.kernels.decode_attention import op as attention_op
from specmoe_compile.kernels.decode_attention.op import attended_range, decode_attention
from specmoe_compile.kernels.decode_attention.reference import (
    attended_range_reference,
    decode_attention_reference,
)
from specmoe_compile.passes.read_filled_cache import AttentionReport
from specmoe_compile.runtime.cpu.native.structures import DTYPES, AttentionCall
from tests.runtime.cpu.test_native_kernels import KERNELS, engine
from tests.runtime.test_session import make_session

BOOL = 3
TOLERANCE = {
    # Sums of some thousand products in another order; outputs are rounded to 8 bits, and to 11.
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
# Sequences, query heads, heads of keys, new tokens, cache length, head size: groups of rows and
# what is left over, tails of heads, one part and several.
SHAPES = (
    (1, 8, 2, 1, 300, 64),
    (2, 6, 6, 1, 97, 32),
    (3, 2, 1, 5, 70, 24),
    (1, 2, 2, 16, 33, 17),
    (2, 5, 1, 2, 40, 256),
    (1, 4, 2, 1, 2600, 64),
    (1, 1, 1, 1, 1, 3),
)


def static_mask(
    sequences: int, queries: int, length: int, filled: int, *, padded: int = 0
) -> Tensor:
    """What transformers makes for a static cache of which `filled` keys count, [B, 1, Q, S]."""
    last = torch.arange(filled - queries, filled)
    mask = torch.arange(length) <= last[:, None]
    mask = mask.expand(sequences, 1, queries, length).clone()
    mask[0, :, :, :padded] = False
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sequences, heads, kv_heads, queries, length, head = shape
    q = torch.randn(sequences, queries, heads, head).to(dtype).transpose(1, 2)
    k, v = (torch.randn(sequences, kv_heads, length, head).to(dtype) for _ in range(2))
    return q, k, v


@pytest.fixture
def in_cpp(tiny_experts: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A session whose engine computes what no test may leave to Python."""

    def python(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("left to Python")

    for name in ("scaled_dot_product_attention", "decode_attention_reference"):
        monkeypatch.setattr(attention_op, name, python)
    with make_session("in_place") as session:
        assert session.engine.multiplies
        yield


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None = None) -> Tensor:
    bounds = attended_range(mask)
    assert torch.equal(bounds, attended_range_reference(mask))
    got = decode_attention(q, k, v, mask, bounds, sinks, 0.3)
    want = decode_attention_reference(q, k.nan_to_num(), v.nan_to_num(), mask, sinks, 0.3)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert got.transpose(1, 2).is_contiguous()
    return got


@pytest.mark.usefixtures("in_cpp")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_softmax_over_the_filled_part(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = tensors(shape, dtype)
    queries, length = shape[3:5]
    filled = max(queries, length * 2 // 3)
    # Nothing beyond the filled part is read: NaN there would show.
    k[:, :, filled:], v[:, :, filled:] = float("nan"), float("nan")
    mask = static_mask(shape[0], queries, length, filled)
    check(q, k, v, mask)
    check(q, k, v, additive(mask, dtype))
    check(q, k, v, mask, torch.randn(shape[1]).to(dtype))


@pytest.mark.usefixtures("in_cpp")
def test_masks_are_respected_entry_by_entry() -> None:
    q, k, v = tensors((2, 4, 2, 3, 60, 16), torch.float32)
    mask = static_mask(2, 3, 60, 50, padded=7)
    check(q, k, v, mask)
    check(q, k, v, mask & (torch.arange(60) % 3 != 0))
    check(q, k, v, additive(mask, torch.float32))
    for shape in ((2, 4, 3, 60), (1, 4, 1, 60), (1, 1, 3, 60)):
        check(q, k, v, torch.randn(shape))
    check(q, k, v, static_mask(1, 3, 60, 50))
    nothing = mask.clone()
    nothing[0, :, 0] = False
    assert check(q, k, v, nothing)[0, :, 0].eq(0).all()
    check(q, k, v, additive(nothing, torch.float32))
    nothing[0] = False
    assert check(q, k, v, nothing)[0].eq(0).all()
    check(q, k, v, nothing, torch.full((4,), 30.0))


@pytest.mark.usefixtures("in_cpp")
def test_views_of_caches_are_read_where_they_lie() -> None:
    wide = torch.randn(2, 40, 2, 48)
    k, v = wide[..., :16].transpose(1, 2), wide[..., 16:32].transpose(1, 2)
    q = torch.randn(2, 4, 1, 16)
    mask = static_mask(2, 1, 48, 30)[..., :40]
    assert not (k.is_contiguous() or mask.is_contiguous())
    check(q, k, v, mask)


@pytest.mark.usefixtures("tiny_experts")
def test_what_the_engine_does_not_take_is_pythons() -> None:
    q, k, v = tensors((1, 4, 2, 1, 24, 16), torch.float32)
    mask = static_mask(1, 1, 24, 20)
    bounds = attended_range(mask)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    with make_session("in_place"):
        inside = decode_attention(q, turned, v, mask, bounds, None, 0.3)
        with pytest.raises(ValueError, match="expected a multiple of those"):
            decode_attention(q[:, :3], k, v, mask, bounds, None, 0.3)
    outside = decode_attention(q, k, v, mask, bounds, None, 0.3)
    torch.testing.assert_close(inside, outside)


def strides_of(tensor: Tensor) -> Any:
    shared = (0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (ctypes.c_int64 * 3)(*list(shared)[:3])


def by_engine(kernels: str, threads: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bounds = attended_range_reference(mask)
    sequences, heads, queries, head = q.shape
    out = torch.full((sequences, queries, heads, head), float("nan"), dtype=q.dtype)
    native = engine(kernels, threads)
    call = AttentionCall(
        **{n: t.data_ptr() for n, t in (("q", q), ("k", k), ("v", v), ("mask", mask))},
        **{f"{n}_strides": strides_of(t) for n, t in (("q", q), ("k", k), ("v", v))},
        mask_strides=strides_of(mask),
        bounds=bounds.data_ptr(),
        out=out.data_ptr(),
        sequences=sequences,
        heads=heads,
        kv_heads=k.shape[1],
        queries=queries,
        head=head,
        bound_rows=len(bounds),
        dtype=DTYPES[q.dtype],
        mask_dtype=BOOL,
        scale=0.3,
    )
    native.library.specmoe_engine_attend(native.pointer, ctypes.byref(call))
    return out.transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_bits_are_those_of_one_thread_in_portable_code(
    kernels: str, dtype: torch.dtype
) -> None:
    for shape in ((2, 6, 2, 2, 2600, 40), (1, 3, 3, 1, 50, 17)):
        q, k, v = tensors(shape, dtype)
        mask = static_mask(shape[0], shape[3], shape[4], shape[4] - 7, padded=5)
        want = by_engine("portable", 1, q, k, v, mask)
        reference = decode_attention_reference(q, k, v, mask, None, 0.3)
        torch.testing.assert_close(want, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        for threads in (1, 3):
            assert torch.equal(by_engine(kernels, threads, q, k, v, mask), want)


@pytest.mark.usefixtures("tiny_experts")
def test_the_backend_rewrites_attention_where_the_engine_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, ...]] = []
    sessions: list[Any] = []

    def rewrite(gm: Any, *, device_types: tuple[str, ...]) -> AttentionReport:
        seen.append(device_types)
        return AttentionReport()

    monkeypatch.setattr(backend, "read_filled_cache", rewrite)
    monkeypatch.setattr(backend, "_sessions_of", lambda gm: sessions)
    graph = torch.fx.GraphModule({}, torch.fx.Graph())
    with make_session("in_place") as session:
        sessions.append(session)
        backend._read_filled_cache(graph)
        other = SimpleNamespace(device=session.device, engine=SimpleNamespace(multiplies=False))
        sessions.append(other)
        backend._read_filled_cache(graph)
    assert seen == [("cpu",), ("cuda",)]


def test_keys_need_no_threads_of_torch_where_none_are_left_to_it() -> None:
    graph = torch.fx.Graph()
    module = torch.fx.GraphModule({}, graph)
    assert not backend._engine_attends(module)
    graph.call_function(torch.ops.specmoe_kernels.decode_attention.default)
    assert backend._engine_attends(module)
    graph.call_function(torch.nn.functional.scaled_dot_product_attention)
    assert not backend._engine_attends(module)
