"""Transfer by reader threads: records of a store on disk (or in RAM) into host memory.

The threads block in the store, outside the interpreter's lock. Demand reads are served in the order
they were asked for, and before any speculative one; a read that has started is not interrupted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence

import torch

from specmoe_compile.errors import TransferError
from specmoe_compile.runtime.expert_store import ExpertStore
from specmoe_compile.runtime.transfer.base import (
    CANCELLED,
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    Read,
    Ticket,
    Transfer,
)

GUESSED_BYTES_IN_FLIGHT = 4 << 20
"""Speculative reads in progress at once, at least one: a demand read has to share the link with
them, and a few MiB in flight keep any disk busy."""
DEMAND_BESIDE_GUESS = 1
"""Demand reads in progress beside which a speculative one may start. With more the disk is busy,
and the step waits for them; but the last one alone seldom keeps it so."""


class DiskTicket(Ticket):
    """Reads that one `start` queued."""

    __slots__ = ("_transfer", "layer", "reads")

    def __init__(self, transfer: DiskTransfer, layer: int, reads: dict[int, Read]) -> None:
        self._transfer = transfer
        self.layer = layer
        self.reads = reads

    def wait(self, expert: int | None = None) -> None:
        for read in [self.reads[expert]] if expert is not None else self.reads.values():
            raise_unless_done(self._transfer.wait_any((read,)))


def raise_unless_done(read: Read) -> None:
    """Raise `TransferError` for a final read that did not bring its record."""
    if read.state == DONE:
        return
    where = f"expert {read.expert} of MoE layer {read.layer}"
    if read.state == FAILED:
        raise TransferError(f"Reading {where} failed: {read.error}") from read.error
    raise TransferError(f"The read of {where} was cancelled.")


class DiskTransfer(Transfer):
    """Reader threads over `store.read_into`, with two queues: demand and speculative."""

    def __init__(self, store: ExpertStore, *, reader_threads: int = 4) -> None:
        """Start the threads.

        Args:
            store: where records come from; closing it is the caller's business.
            reader_threads: reads in flight at most.
        """
        if reader_threads < 1:
            raise ValueError(f"reader_threads={reader_threads} must be at least 1.")
        self._store = store
        self._mutex = threading.Lock()
        self._work = threading.Condition(self._mutex)
        self._arrived = threading.Condition(self._mutex)
        self._demand: deque[Read] = deque()
        self._speculative: deque[Read] = deque()
        self._closed = False
        self._active = 0
        self._guesses = 0
        largest = max(layout.record_bytes for layout in store.layouts)
        self._most_guesses = max(1, min(reader_threads, GUESSED_BYTES_IN_FLIGHT // largest))
        self._busy_s = 0.0
        self._busy_since_s = 0.0
        self._threads = [
            threading.Thread(target=self._run, name=f"specmoe-reader-{i}", daemon=True)
            for i in range(reader_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy_ms(self) -> float:
        with self._mutex:
            running_s = time.perf_counter() - self._busy_since_s if self._active else 0.0
            return (self._busy_s + running_s) * 1e3

    def start(
        self,
        layer: int,
        requests: Sequence[tuple[int, torch.Tensor]],
        *,
        speculative: bool = False,
    ) -> DiskTicket:
        reads = {
            expert: Read(layer, expert, destination, speculative=speculative)
            for expert, destination in requests
        }
        with self._mutex:
            self._check_open()
            (self._speculative if speculative else self._demand).extend(reads.values())
            self._work.notify(len(reads))
        return DiskTicket(self, layer, reads)

    def cancel(self, ticket: Ticket, experts: Collection[int] | None = None) -> list[int]:
        cancelled: list[int] = []
        with self._mutex:
            for expert, read in ticket.reads.items():
                if read.state == QUEUED and (experts is None or expert in experts):
                    # It stays in its queue; the thread that meets it there drops it.
                    read.state = CANCELLED
                    cancelled.append(expert)
            if cancelled:
                self._arrived.notify_all()
        return cancelled

    def promote(self, read: Read) -> bool:
        with self._mutex:
            if not read.speculative:
                return False
            read.speculative = False
            if read.state != QUEUED:
                return False
            # Its entry in the speculative queue is dropped there, being no longer speculative.
            self._demand.append(read)
            return True

    def wait_any(self, reads: Iterable[Read]) -> Read:
        with self._mutex:
            waiting = tuple(reads)
            if not waiting:
                raise ValueError("wait_any needs at least one read.")
            while True:
                for read in waiting:
                    if read.state >= DONE:
                        return read
                self._check_open()
                self._arrived.wait()

    def close(self) -> None:
        with self._mutex:
            if not self._closed:
                self._closed = True
                for read in (*self._demand, *self._speculative):
                    if read.state == QUEUED:
                        read.state = CANCELLED
                self._demand.clear()
                self._speculative.clear()
                self._work.notify_all()
                self._arrived.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise TransferError("The session is closed: its experts can no longer be read.")

    def _run(self) -> None:
        """Body of a reader thread."""
        while True:
            with self._mutex:
                read = self._next_or_none()
                while read is None:
                    if self._closed:
                        return
                    self._work.wait()
                    read = self._next_or_none()
                read.state = RUNNING
                read.started_s = time.perf_counter()
                guess = read.speculative
                self._guesses += guess
                if self._active == 0:
                    self._busy_since_s = read.started_s
                self._active += 1
            error: BaseException | None = None
            try:
                self._store.read_into(read.layer, read.expert, read.destination)
            except BaseException as raised:
                # Whatever it is, the waiter gets it; a dead thread would leave it waiting.
                error = raised
            with self._mutex:
                read.error = error
                read.finished_s = time.perf_counter()
                read.state = DONE if error is None else FAILED
                self._guesses -= guess
                self._active -= 1
                if self._active == 0:
                    self._busy_s += read.finished_s - self._busy_since_s
                self._arrived.notify_all()
                if self._speculative:
                    self._work.notify()

    def _next_or_none(self) -> Read | None:
        """Take the next read to serve; the mutex is held."""
        while self._demand:
            read = self._demand.popleft()
            if read.state == QUEUED:
                return read
        if self._active - self._guesses > DEMAND_BESIDE_GUESS:
            return None
        while self._speculative and self._guesses < self._most_guesses:
            read = self._speculative.popleft()
            if read.state == QUEUED and read.speculative:
                return read
        return None
