"""What the link to a GPU can move, by record size: the copy engine, and a gather in a CUDA graph.

Times are the device's own, over so many bytes that launches do not count; that is what a decode
step in a CUDA graph sees. `runtime.cuda.rates` compares the two transfers as the host sees them.

Shape letters: E records.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specmoe_compile.kernels.gather_experts.op import gather_experts

RECORD_BYTES = (256 << 10, 1 << 20, 3 << 20, 9 << 20, 27 << 20)
_MOVED_BYTES = 256 << 20
_RECORDS_PER_GATHER = 8
_RUNS = 5

Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRate:
    """Bandwidths in records of one size, 1e9 bytes per second."""

    record_bytes: int
    copy_gbps: float
    gather_gbps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """What a link moves.

    Attributes:
        large_bytes: of one large copy. large_copy_gbps: its bandwidth, the link's limit.
        by_record: smallest record first.
    """

    large_bytes: int
    large_copy_gbps: float
    by_record: tuple[RecordRate, ...]


class Link(Protocol):
    """A device, as far as the measurement needs it."""

    def host(self, size_bytes: int) -> Tensor:
        """Host memory that the device reads, [size_bytes] uint8."""

    def device(self, size_bytes: int) -> Tensor:
        """Memory of the device, [size_bytes] uint8."""

    def captured(self, work: Work) -> Work:
        """Record launches of `work` once; the result runs them again."""

    def seconds(self, work: Work) -> float:
        """Time on the device that `work` takes."""


class CudaLink:
    """The link to the current CUDA device."""

    def host(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def device(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cuda")

    def captured(self, work: Work) -> Work:
        work()  # compiles the kernel
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def seconds(self, work: Work) -> float:
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        elapsed_ms: float = begin.elapsed_time(end)
        return elapsed_ms / 1e3


def measure_link(
    record_bytes: Sequence[int] = RECORD_BYTES,
    *,
    link: Link | None = None,
    moved_bytes: int = _MOVED_BYTES,
) -> LinkRates:
    """Measure both transfers for each record size; medians of five runs.

    Args:
        record_bytes: multiples of 16, each at most `moved_bytes`.
        link: what is measured; the current CUDA device by default.
        moved_bytes: bytes of a run, about; so much host and device memory is needed.
    """
    link = CudaLink() if link is None else link
    source, target = link.host(moved_bytes), link.device(moved_bytes)
    return LinkRates(
        large_bytes=moved_bytes,
        large_copy_gbps=_gbps(link, moved_bytes, lambda: _copy(source, target)),
        by_record=tuple(_rate(link, source, target, size) for size in sorted(set(record_bytes))),
    )


def _rate(link: Link, source: Tensor, target: Tensor, record_bytes: int) -> RecordRate:
    records = len(source) // record_bytes
    moved_bytes = records * record_bytes
    from_host = source[:moved_bytes].view(records, record_bytes)
    to_device = target[:moved_bytes].view(records, record_bytes)
    experts = torch.arange(records, dtype=torch.int32, device=target.device)
    parts = torch.split(experts, _RECORDS_PER_GATHER)
    counts = [torch.full((1,), len(p), dtype=torch.int32, device=target.device) for p in parts]

    def copy() -> None:
        for record in range(records):
            _copy(from_host[record], to_device[record])

    def gather() -> None:
        for part, count in zip(parts, counts, strict=True):
            gather_experts([from_host], [to_device], part, part, count)

    return RecordRate(
        record_bytes=record_bytes,
        copy_gbps=_gbps(link, moved_bytes, copy),
        gather_gbps=_gbps(link, moved_bytes, link.captured(gather)),
    )


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _gbps(link: Link, moved_bytes: int, work: Work) -> float:
    work()
    return moved_bytes / 1e9 / statistics.median(link.seconds(work) for _ in range(_RUNS))
