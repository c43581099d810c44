"""A sum over ranks in each of its ways, as a decode step has them: many, in one CUDA graph.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specmoe_compile.kernels.sum_ranks.op import sum_ranks
from specmoe_compile.runtime.cuda.inboxes import open_inboxes

KINDS = ("all_reduce", "one_shot", "torch_one_shot")
"""NCCL's; `sum_ranks`; PyTorch's own over symmetric memory, with a barrier before and after."""
SUMS = 97
"""Of a token of Qwen3-30B-A3B: two of each layer and that of the embedding."""
REPLAYS = 60
TOKENS = (1, 16)

Sum = Callable[[Tensor], Tensor]


def time_sums(hidden: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Median microseconds of one of `SUMS` sums of [T, H], by kind and T.

    Returns:
        `us`: by kind and T, a number, or a reason in words; and `same_bits`: whether the sums of
        random numbers are NCCL's to the bit, on this rank. Only two ranks must agree so.
    """
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    reason = open_inboxes([group], device)[group]
    us: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    same: dict[str, dict[str, bool]] = {kind: {} for kind in KINDS[1:]}
    torch.manual_seed(dist.get_rank())
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        expected = _sum_of("all_reduce", group, x)(x)
        for kind in KINDS:
            if kind != "all_reduce" and reason is not None:
                us[kind][str(tokens)] = reason
                continue
            add = _sum_of(kind, group, x)
            if kind in same:
                same[kind][str(tokens)] = torch.equal(add(x), expected)
            us[kind][str(tokens)] = _time(add, torch.full_like(x, 1e-9))
    return {"us": us, "same_bits": same, "sums": SUMS, "hidden": hidden}


def _sum_of(kind: str, group: str, like: Tensor) -> Sum:
    """A sum of tensors like one, as compiled code calls it."""
    ops: Any = torch.ops
    if kind == "all_reduce":
        c10d = ops._c10d_functional
        return lambda x: c10d.wait_tensor(c10d.all_reduce(x, "sum", group))
    if kind == "one_shot":
        return lambda x: sum_ranks(x, group)
    import torch.distributed._symmetric_memory as memory

    shared = memory.empty(like.shape, dtype=like.dtype, device=like.device)
    memory.rendezvous(shared, dist.group.WORLD)  # type: ignore[arg-type]

    def add(x: Tensor) -> Tensor:
        total: Tensor = ops.symm_mem.one_shot_all_reduce(shared.copy_(x), "sum", group)
        return total

    return add


def _time(add: Sum, x: Tensor) -> float:
    """Median microseconds of a sum inside a CUDA graph; on a CPU one after the other."""

    def chain() -> Tensor:
        out = x
        for _ in range(SUMS):
            out = add(out)
        return out

    if x.device.type != "cuda":
        began_s = time.perf_counter()
        chain()
        return 1e6 * (time.perf_counter() - began_s) / SUMS
    replay = _captured(chain)
    spans = []
    for _ in range(REPLAYS):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()  # both ranks are here once it is over
        begin.record()
        replay()
        end.record()
        end.synchronize()
        spans.append(1e3 * begin.elapsed_time(end) / SUMS)
    return float(median(spans))


def _captured(run: Callable[[], Tensor]) -> Callable[[], None]:
    """A function that replays what `run` launches, from a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread asks for events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay
