"""Bringing records from the expert store into the fast tier, one ticket per start.

A transfer fills destinations that the caller owns and keeps alive until the ticket is done or its
reads are cancelled. A caller that meets an error may leave; the destinations of reads that have
started stay in use until those reads are `final`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

import torch

QUEUED: Final = 0
RUNNING: Final = 1
DONE: Final = 2
FAILED: Final = 3
CANCELLED: Final = 4


class Read:
    """One record on its way; `state` is one of the constants above and only ever grows.

    Attributes:
        destination: [record_bytes] uint8, where the record goes.
        speculative: a guess, which yields to demand reads; False once it is promoted.
        error: what the reader raised, when `state` is FAILED.
        started_s, finished_s: `Transfer.now_s` when it began and ended; 0 before.
    """

    __slots__ = (
        "destination",
        "error",
        "expert",
        "finished_s",
        "layer",
        "speculative",
        "started_s",
        "state",
    )

    def __init__(
        self, layer: int, expert: int, destination: torch.Tensor, *, speculative: bool
    ) -> None:
        self.layer = layer
        self.expert = expert
        self.destination = destination
        self.speculative = speculative
        self.state = QUEUED
        self.error: BaseException | None = None
        self.started_s = 0.0
        self.finished_s = 0.0

    @property
    def final(self) -> bool:
        """Whether nothing will write to the destination any more."""
        return self.state >= DONE


class Ticket(ABC):
    """What `Transfer.start` returns: the reads it started, by expert."""

    reads: dict[int, Read]

    @property
    def done(self) -> bool:
        """Whether every read is final, whatever came of it."""
        return all(read.final for read in self.reads.values())

    @abstractmethod
    def wait(self, expert: int | None = None) -> None:
        """Block until one expert, or every one, is there.

        Raises:
            TransferError: a read failed or was cancelled, chained from what the reader raised.
        """


class Issued(NamedTuple):
    """What a prefetch started: its reads by expert, and the experts that lost their slots."""

    reads: dict[int, Read]
    evicted: list[int]


NOTHING_ISSUED = Issued({}, [])


class Transfer(ABC):
    """A way of moving records; `close` ends it and makes every waiter raise."""

    def now_s(self) -> float:
        """Return the time by the clock that reads are timed with, in seconds."""
        return time.perf_counter()

    @abstractmethod
    def start(
        self,
        layer: int,
        requests: Sequence[tuple[int, torch.Tensor]],
        *,
        speculative: bool = False,
    ) -> Ticket:
        """Start reads; returns at once.

        Args:
            layer: MoE layer ordinal.
            requests: (expert, destination [record_bytes] uint8) pairs.
            speculative: guesses, served only while no demand read waits.

        Raises:
            TransferError: the transfer is closed.
        """

    @abstractmethod
    def cancel(self, ticket: Ticket, experts: Collection[int] | None = None) -> list[int]:
        """Cancel the reads that have not started, all or some; returns their experts."""

    @abstractmethod
    def promote(self, read: Read) -> bool:
        """Make a speculative read a demand read; returns whether it was still queued."""

    @abstractmethod
    def wait_any(self, reads: Iterable[Read]) -> Read:
        """Block until one of the reads is final and return it; it may have failed.

        Raises:
            TransferError: the transfer was closed meanwhile.
        """

    @property
    @abstractmethod
    def busy_ms(self) -> float:
        """Wall time in which at least one read was in progress."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what is queued, wait for reads in progress, end the threads; may be repeated."""
