"""Decode attention of one layer: `decode_attention` beside PyTorch's, time and bytes.

Shape letters: B sequences, N query heads, G heads of keys and values, S cache length, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specmoe_compile.kernels.decode_attention.op import attended_range, decode_attention
from specmoe_compile.kernels.decode_attention.reference import decode_attention_reference

_BUFFERS = 4
"""Sets of keys and values, used in turn, so that a short cache does not stay in L2."""
_REPLAYS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One layer's attention: name, heads, head size, dtype, filled length, cache length."""

    name: str
    heads: int
    kv_heads: int
    head: int
    filled: int
    length: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    sinks: bool = False


def _shapes() -> Iterator[AttentionShape]:
    qwen: dict[str, Any] = {"name": "Qwen3-30B-A3B", "heads": 32, "kv_heads": 4, "head": 128}
    for filled, length in ((1024, 1152), (65536, 65664), (1024, 65664), (4096, 4224)):
        yield AttentionShape(**qwen, filled=filled, length=length)
    yield AttentionShape(**qwen, filled=4096, length=4224, batch=8)
    yield AttentionShape(**qwen, filled=4096, length=4224, dtype=torch.float32)
    oss: dict[str, Any] = {"name": "GPT-OSS-20B", "heads": 64, "kv_heads": 8, "head": 64}
    for filled in (128, 4096, 65536):
        yield AttentionShape(**oss, filled=filled, length=filled, sinks=True)


def measure_attention(device: torch.device, *, dry: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per shape."""
    if dry:
        yield _measure(
            AttentionShape(name="tiny", heads=4, kv_heads=2, head=16, filled=20, length=32), device
        )
        return
    for shape in _shapes():
        yield _measure(shape, device)
        torch.cuda.empty_cache()


@torch.no_grad()
def _measure(shape: AttentionShape, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=shape.dtype)

    q = random(shape.batch, shape.heads, 1, shape.head)
    size = (shape.batch, shape.kv_heads, shape.length, shape.head)
    caches = [(random(*size), random(*size)) for _ in range(_BUFFERS)]
    keys = torch.arange(shape.length, device=device)
    mask = (keys < shape.filled).expand(shape.batch, 1, 1, shape.length).contiguous()
    sinks = random(shape.heads) if shape.sinks else None
    scale = shape.head**-0.5
    bounds = attended_range(mask)

    def ours(k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(q, k, v, mask, bounds, sinks, scale)

    def grouped(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    def repeated(k: Tensor, v: Tensor) -> Tensor:
        times = shape.heads // shape.kv_heads
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)

    k, v = caches[0]
    want = decode_attention_reference(q, k, v, mask, sinks, scale).float()
    error = ((ours(k, v).float() - want).norm() / want.norm()).item()
    kept = 2 * shape.batch * shape.kv_heads * shape.filled * shape.head * shape.dtype.itemsize
    row: dict[str, Any] = {
        "shape": f"{shape.name} B={shape.batch} {str(shape.dtype).removeprefix('torch.')}",
        "length": f"{shape.filled} of {shape.length}",
        "relative_error": error,
        "filled_bytes": kept,
    }
    if device.type == "cuda":
        rivals: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": ours}
        if sinks is None:
            rivals |= {"enable_gqa": grouped, "repeated": repeated}
        for name, call in rivals.items():
            row[f"{name}_us"] = _replay_us(call, caches)
        row["range_us"] = _replay_us(lambda k, v: attended_range(mask), caches)
        row["ours_gbps"] = kept / row["ours_us"] / 1e3
    return row


def _replay_us(call: Callable[[Tensor, Tensor], Tensor], caches: Any) -> float:
    """Time of one call inside a captured graph, us: the median of its replays."""
    for k, v in caches:
        call(k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = 8
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for k, v in caches:
                call(k, v)
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / (rounds * len(caches)))
    return sorted(times)[len(times) // 2]
