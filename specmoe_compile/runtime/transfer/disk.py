"""Transfer by reader threads: records of a store on disk (or in RAM) into host memory.

The threads block in the store, outside the interpreter's lock. Demand reads are served in the order
they were asked for, and before any speculative one; a read that has started is not interrupted.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence

import torch

from specmoe_compile.errors import TransferError
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.transfer.base import DONE, FAILED, Read, Ticket, Transfer
from specmoe_compile.runtime.transfer.read_queue import ReadQueue

_open_transfers: weakref.WeakSet[DiskTransfer] = weakref.WeakSet()
_held: list[DiskTransfer] = []
"""Those that stand still while this process forks."""


def _before_fork() -> None:
    for transfer in list(_open_transfers):
        transfer.hold_still()
        _held.append(transfer)


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().go_on()


def _after_fork_in_child() -> None:
    while _held:
        _held.pop().renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


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
    """Reader threads over `store.read_into`, which serve one `ReadQueue`."""

    def __init__(self, store: ExpertStore, *, reader_threads: int = 4) -> None:
        """Start the threads.

        Args:
            store: where records come from; closing it is the caller's business.
            reader_threads: reads in flight at most.
        """
        if reader_threads < 1:
            raise ValueError(f"reader_threads={reader_threads} must be at least 1.")
        self._store = store
        self._readers = reader_threads
        self._make_locks()
        self._queue = ReadQueue(
            readers=reader_threads,
            largest_record_bytes=max(layout.record_bytes for layout in store.layouts),
        )
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._start_threads()
        _open_transfers.add(self)

    def _make_locks(self) -> None:
        self._mutex = threading.Lock()
        self._work = threading.Condition(self._mutex)
        self._gates: list[threading.Lock] = []  # one per thread that waits for reads to end

    def _start_threads(self) -> None:
        self._threads = [
            threading.Thread(target=self._run, name=f"specmoe-reader-{i}", daemon=True)
            for i in range(self._readers)
        ]
        for thread in self._threads:
            thread.start()

    def hold_still(self) -> None:
        """Let no thread change the queue, until `go_on` or, in the forked process, `renew...`."""
        self._mutex.acquire()

    def go_on(self) -> None:
        """Undo `hold_still`."""
        self._mutex.release()

    def renew_after_fork(self) -> None:
        """In a forked process: forget the parent's threads, which are not here.

        New ones start with the first read; reads that were in progress begin again.
        """
        self._make_locks()
        self._queue.begin_again()
        self._threads = []

    @property
    def busy_ms(self) -> float:
        with self._mutex:
            return self._queue.busy_ms(self.now_s())

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
            self._ensure_threads()
            self._queue.add(reads.values(), speculative=speculative)
            self._work.notify(len(reads))
        return DiskTicket(self, layer, reads)

    def cancel(self, ticket: Ticket, experts: Collection[int] | None = None) -> list[int]:
        with self._mutex:
            cancelled = self._queue.cancel(ticket.reads.values(), experts)
            if cancelled:
                self._open_gates()
        return cancelled

    def promote(self, read: Read) -> bool:
        with self._mutex:
            promoted = self._queue.promote(read)
            if promoted:
                # A reader may be idle because enough guesses are in progress.
                self._work.notify()
        return promoted

    def wait_any(self, reads: Iterable[Read]) -> Read:
        waiting = tuple(reads)
        if not waiting:
            raise ValueError("wait_any needs at least one read.")
        while True:
            with self._mutex:
                self._ensure_threads()
                for read in waiting:
                    if read.state >= DONE:
                        return read
                self._check_open()
                gate = threading.Lock()
                gate.acquire()
                self._gates.append(gate)
            # Not in a Condition: between its release of the mutex and its waiting, Ctrl-C would
            # release the mutex once more, which by then is a reader's.
            gate.acquire()

    def _open_gates(self) -> None:
        """Let every waiting thread look again; the caller holds the mutex."""
        for gate in self._gates:
            gate.release()
        self._gates.clear()

    def close(self) -> None:
        with self._mutex:
            if not self._closed:
                self._closed = True
                self._queue.clear()
                self._work.notify_all()
                self._open_gates()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _ensure_threads(self) -> None:
        if not self._threads and not self._closed:
            self._start_threads()

    def _check_open(self) -> None:
        if self._closed:
            raise TransferError("The session is closed: its experts can no longer be read.")

    def _run(self) -> None:
        """Body of a reader thread."""
        while True:
            with self._mutex:
                read = self._queue.begin_or_none(self.now_s())
                while read is None:
                    if self._closed:
                        return
                    self._work.wait()
                    read = self._queue.begin_or_none(self.now_s())
            error: BaseException | None = None
            try:
                self._store.read_into(read.layer, read.expert, read.destination)
            except BaseException as raised:
                # Whatever it is, the waiter gets it; a dead thread would leave it waiting.
                error = raised
            with self._mutex:
                another = self._queue.finish(read, self.now_s(), error)
                self._open_gates()
                if another:
                    self._work.notify()
