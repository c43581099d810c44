"""A link on simulated time: reads that share its bandwidth, served in the runtime's own order.

It stands where a session has reader threads. Time passes only when somebody computes (`advance`) or
waits (`wait_any`); reads progress meanwhile, several at once, and end one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from specmoe_compile.errors import TransferError
from specmoe_compile.runtime.transfer.base import DONE, Read, Ticket, Transfer
from specmoe_compile.runtime.transfer.read_queue import ReadQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What brings experts into the fast tier.

    Reads in progress share `gbps` evenly, none gets more than `one_read_gbps`; the first
    `latency_us` of a read move nothing.
    """

    gbps: float
    """bandwidth of all reads together, 1e9 bytes per second."""
    one_read_gbps: float | None = None
    """most that a single read gets; None: all of it."""
    latency_us: float = 0.0
    """from the start of a read to its first byte, microseconds."""
    readers: int = 4
    """reads in progress at most."""

    def __post_init__(self) -> None:
        for name in ("gbps", "one_read_gbps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be above 0, in 1e9 bytes per second.")
        if not (self.latency_us >= 0 and math.isfinite(self.latency_us)):
            raise ValueError(f"latency_us={self.latency_us} must be 0 or more microseconds.")
        if self.readers < 1:
            raise ValueError(f"readers={self.readers} must be at least 1.")


class SimulatedTicket(Ticket):
    """Reads that one `start` queued."""

    def __init__(self, reads: dict[int, Read]) -> None:
        self.reads = reads

    def wait(self, expert: int | None = None) -> None:
        raise TransferError("a simulated read is waited for by wait_any")


class _Flow:
    """A read in progress: when its bytes begin to move, and how many are left."""

    __slots__ = ("begins_s", "left_bytes", "read")

    def __init__(self, read: Read, begins_s: float) -> None:
        self.read = read
        self.begins_s = begins_s
        self.left_bytes = float(read.destination.numel())


class SimulatedLink(Transfer):
    """Moves nothing, and keeps the time that moving would take."""

    def __init__(self, link: Link, *, largest_record_bytes: int) -> None:
        """Start at time 0 with nothing to read."""
        self.link = link
        self._now_s = 0.0
        self._flows: list[_Flow] = []
        self._queue = ReadQueue(readers=link.readers, largest_record_bytes=largest_record_bytes)

    def now_s(self) -> float:
        return self._now_s

    @property
    def busy_ms(self) -> float:
        return self._queue.busy_ms(self._now_s)

    def advance(self, seconds: float) -> None:
        """Let time pass, for something else than waiting."""
        end_s = self._now_s + seconds
        while self._flows and self._next_event_s() <= end_s:
            self._run_to(self._next_event_s())
        self._run_to(end_s)

    def start(
        self,
        layer: int,
        requests: Sequence[tuple[int, torch.Tensor]],
        *,
        speculative: bool = False,
    ) -> SimulatedTicket:
        reads = {
            expert: Read(layer, expert, destination, speculative=speculative)
            for expert, destination in requests
        }
        self._queue.add(reads.values(), speculative=speculative)
        self._fill_up()
        return SimulatedTicket(reads)

    def cancel(self, ticket: Ticket, experts: Collection[int] | None = None) -> list[int]:
        return self._queue.cancel(ticket.reads.values(), experts)

    def promote(self, read: Read) -> bool:
        promoted = self._queue.promote(read)
        self._fill_up()
        return promoted

    def wait_any(self, reads: Iterable[Read]) -> Read:
        waiting = tuple(reads)
        while True:
            for read in waiting:
                if read.state >= DONE:
                    return read
            if not self._flows:
                raise TransferError("a simulated read is waited for that nobody started")
            self._run_to(self._next_event_s())

    def close(self) -> None:
        self._queue.clear()

    def _fill_up(self) -> None:
        """Begin queued reads on the readers that are free."""
        while self._queue.running < self.link.readers:
            read = self._queue.begin_or_none(self._now_s)
            if read is None:
                return
            self._flows.append(_Flow(read, self._now_s + self.link.latency_us * 1e-6))

    def _rate(self) -> float:
        """Bytes per second of each read whose bytes move."""
        moving = sum(flow.begins_s <= self._now_s for flow in self._flows)
        share = self.link.gbps / max(1, moving)
        return 1e9 * min(share, self.link.one_read_gbps or share)

    def _next_event_s(self) -> float:
        """When the next read ends, or its bytes begin to move."""
        rate = self._rate()
        return min(
            flow.begins_s if flow.begins_s > self._now_s else self._now_s + flow.left_bytes / rate
            for flow in self._flows
        )

    def _run_to(self, end_s: float) -> None:
        """Go to a time before which nothing begins or ends, and end what ends then."""
        moved = self._rate() * (end_s - self._now_s)
        for flow in self._flows:
            if flow.begins_s <= self._now_s:
                flow.left_bytes -= moved
        self._now_s = end_s
        # Half a byte: what is left of a sum of floats.
        ended = [flow for flow in self._flows if flow.left_bytes < 0.5]
        if ended:
            self._flows = [flow for flow in self._flows if flow.left_bytes >= 0.5]
            for flow in ended:
                self._queue.finish(flow.read, end_s)
            self._fill_up()
