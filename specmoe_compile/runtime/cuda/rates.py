"""How fast records come from page-locked host memory, by the copy engine and by a kernel.

Shape letters: E experts, S slots.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.system.sizes import format_bytes

_RUNS = 7
_MOST_RECORDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRates:
    """Bandwidths of one machine and record size.

    Attributes:
        record_bytes: size of a record.
        records: copied in a row in one run.
        copy_gbps, gather_gbps: 1e9 bytes per second, medians, the device idle otherwise.
    """

    record_bytes: int
    records: int
    copy_gbps: float
    gather_gbps: float

    @property
    def faster(self) -> Literal["copy", "gather"]:
        """Return "copy" or "gather"; the latter if they are equal, since it needs no host."""
        return "copy" if self.copy_gbps > self.gather_gbps else "gather"

    def __str__(self) -> str:
        return (
            f"copy {self.copy_gbps:.1f} GB/s, gather {self.gather_gbps:.1f} GB/s in records of"
            f" {format_bytes(self.record_bytes)}"
        )


def measure_rates(
    source: Tensor,
    target: Tensor,
    *,
    synchronize: Callable[[], None] = torch.cuda.synchronize,
    clock: Callable[[], float] = time.perf_counter,
) -> TransferRates:
    """Time both ways of moving a few records, one after the other in turn.

    Args:
        source: [E, record_bytes] uint8 in page-locked host memory.
        target: [S, record_bytes] uint8 on the device; overwritten.
        synchronize: waits for the device.
        clock: seconds.
    """
    records = min(_MOST_RECORDS, len(source), len(target))
    device = target.device
    fills = torch.arange(records, dtype=torch.int32, device=device)
    count = torch.full((1,), records, dtype=torch.int32, device=device)

    def copy() -> None:
        for record in range(records):
            target[record].copy_(source[record], non_blocking=True)

    def gather() -> None:
        gather_experts([source], [target], fills, fills, count)

    times_s: dict[str, list[float]] = {"copy": [], "gather": []}
    for run in range(1 + _RUNS):
        for name, work in (("copy", copy), ("gather", gather)):
            synchronize()
            started_s = clock()
            work()
            synchronize()
            if run:  # the first one compiles the kernel
                times_s[name].append(clock() - started_s)
    moved_bytes = records * source.shape[1]
    return TransferRates(
        record_bytes=source.shape[1],
        records=records,
        copy_gbps=_gbps(moved_bytes, times_s["copy"]),
        gather_gbps=_gbps(moved_bytes, times_s["gather"]),
    )


def _gbps(moved_bytes: int, times_s: Sequence[float]) -> float:
    return moved_bytes / 1e9 / statistics.median(times_s)
