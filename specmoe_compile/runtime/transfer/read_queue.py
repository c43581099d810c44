"""Which read is served next: demand reads in the order they were asked for, then guesses.

The order is one thing and when the reads run is another: reader threads ask this queue, and so does
the model of a link that replays a trace. It does not lock; its owner does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from specmoe_compile.runtime.transfer.base import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Read

GUESSED_BYTES_IN_FLIGHT = 4 << 20
"""Speculative reads in progress at once, at least one: a demand read has to share the link with
them, and a few MiB in flight keep any disk busy."""
DEMAND_BESIDE_GUESS = 1
"""Demand reads in progress beside which a speculative one may start. With more the disk is busy,
and the step waits for them; but the last one alone seldom keeps it so."""


class ReadQueue:
    """Reads that wait, and how many run.

    Attributes:
        running: how many reads are in progress.
        busy_s: time in which at least one read was in progress, up to the last time none was.
        max_guesses: speculative reads in progress at most.
    """

    def __init__(self, *, readers: int, largest_record_bytes: int) -> None:
        """Start empty.

        Args:
            readers: reads in progress at most.
            largest_record_bytes: of the store.
        """
        self.busy_s = 0.0
        self.max_guesses = max(1, min(readers, GUESSED_BYTES_IN_FLIGHT // largest_record_bytes))
        self._busy_since_s = 0.0
        self._demand: deque[Read] = deque()
        self._speculative: deque[Read] = deque()
        self._in_progress: set[Read] = set()
        # Those of them that began as guesses, promoted since or not.
        self._guesses: set[Read] = set()

    @property
    def running(self) -> int:
        return len(self._in_progress)

    def add(self, reads: Iterable[Read], *, speculative: bool) -> None:
        """Enter reads, in order."""
        (self._speculative if speculative else self._demand).extend(reads)

    def cancel(self, reads: Iterable[Read], experts: Collection[int] | None) -> list[int]:
        """Take back reads that have not begun, all or those of some experts; returns these."""
        cancelled: list[int] = []
        for read in reads:
            if read.state == QUEUED and (experts is None or read.expert in experts):
                # It stays in its queue; whoever meets it there drops it.
                read.state = CANCELLED
                cancelled.append(read.expert)
        return cancelled

    def promote(self, read: Read) -> bool:
        """Make a speculative read a demand read; returns whether it was still queued."""
        if not read.speculative:
            return False
        read.speculative = False
        if read.state != QUEUED:
            return False
        # Its entry in the speculative queue is dropped there, being no longer speculative.
        self._demand.append(read)
        return True

    def begin_or_none(self, now_s: float) -> Read | None:
        """Take the next read to serve and mark it as running, if there is one."""
        read = self._next_or_none()
        if read is None:
            return None
        read.state = RUNNING
        read.started_s = now_s
        if read.speculative:
            self._guesses.add(read)
        if self.running == 0:
            self._busy_since_s = now_s
        self._in_progress.add(read)
        return read

    def finish(self, read: Read, now_s: float, error: BaseException | None = None) -> bool:
        """Mark a running read as final; returns whether that lets another guess begin."""
        read.error = error
        read.finished_s = now_s
        read.state = DONE if error is None else FAILED
        self._guesses.discard(read)
        self._in_progress.discard(read)
        if self.running == 0:
            self.busy_s += now_s - self._busy_since_s
        return bool(self._speculative)

    def begin_again(self) -> None:
        """Queue what is in progress once more, in front: whoever served it is gone."""
        for read in self._in_progress:
            read.state = QUEUED
            (self._speculative if read.speculative else self._demand).appendleft(read)
        self._in_progress.clear()
        self._guesses.clear()

    def busy_ms(self, now_s: float) -> float:
        """Return the time until now in which at least one read was in progress."""
        running_s = now_s - self._busy_since_s if self.running else 0.0
        return (self.busy_s + running_s) * 1e3

    def clear(self) -> None:
        """Cancel everything that has not begun."""
        self.cancel((*self._demand, *self._speculative), None)
        self._demand.clear()
        self._speculative.clear()

    def _next_or_none(self) -> Read | None:
        while self._demand:
            read = self._demand.popleft()
            if read.state == QUEUED:
                return read
        if self.running - len(self._guesses) > DEMAND_BESIDE_GUESS:
            return None
        while self._speculative and len(self._guesses) < self.max_guesses:
            read = self._speculative.popleft()
            if read.state == QUEUED and read.speculative:
                return read
        return None
