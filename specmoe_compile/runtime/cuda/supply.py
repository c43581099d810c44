"""Where the copy engine finds records: in a page-locked store, or read from disk into a ring.

Shape letters: E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from specmoe_compile.runtime.cuda.streams import Streams
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.transfer.base import DONE, Read
from specmoe_compile.runtime.transfer.disk import DiskTransfer, raise_unless_done

MAX_STAGING_BYTES = 1 << 30
MIN_BUFFERS = 4
"""Two for guesses whose copies have not been issued, two that go round."""


class Request(Protocol):
    """One record that was asked for."""

    def record_or_none(self) -> Tensor | None:
        """Return the record, [record_bytes] uint8, page-locked; None while it is being read.

        Raises:
            TransferError: it could not be read.
        """

    def copied(self, event: Any) -> None:
        """Say that the record's memory is free when an event is reached."""

    def abandon(self) -> None:
        """Say that nobody will take the record."""


class Supply(Protocol):
    """Records by layer and expert."""

    def request(self, layer: int, expert: int, *, speculative: bool = False) -> Request:
        """Ask for a record; returns at once."""

    def block(self) -> None:
        """Hold the host back until a request may have got further."""


class _Here:
    """A record that is in page-locked memory anyway."""

    def __init__(self, record: Tensor) -> None:
        self._record = record

    def record_or_none(self) -> Tensor:
        return self._record

    def copied(self, event: Any) -> None:
        pass

    def abandon(self) -> None:
        pass


class PinnedSupply:
    """The records of a store in page-locked RAM."""

    def __init__(self, records: Sequence[Tensor]) -> None:
        """Take the records of each layer, [E, record_bytes] uint8."""
        self._records = records

    def request(self, layer: int, expert: int, *, speculative: bool = False) -> _Here:
        return _Here(self._records[layer][expert])

    def block(self) -> None:
        raise AssertionError("a record in RAM is never waited for")


class _Staged:
    """A record that is read into a buffer of the ring."""

    def __init__(self, supply: StagedSupply, layer: int, expert: int, speculative: bool) -> None:
        self.layer = layer
        self.expert = expert
        self.speculative = speculative
        self.buffer = -1
        self.abandoned = False
        self.read: Read | None = None
        self._supply = supply

    def record_or_none(self) -> Tensor | None:
        self._supply.advance()
        if self.read is None or not self.read.final:
            return None
        if self.read.state != DONE:
            self._supply.give_back(self)
            raise_unless_done(self.read)
        return self.read.destination

    def copied(self, event: Any) -> None:
        self._supply.lend_until(self, event)

    def abandon(self) -> None:
        self.abandoned = True


class StagedSupply:
    """Records of a store on disk, by reader threads, through a ring of page-locked buffers.

    Attributes:
        total_bytes: size of the ring.
    """

    def __init__(
        self,
        store: ExpertStore,
        region: Tensor,
        streams: Streams,
        *,
        reader_threads: int,
    ) -> None:
        """Start the reader threads.

        Args:
            store: on disk; closing it is the caller's business.
            region: the ring, [bytes] uint8, page-locked, see `staging_bytes`.
            streams: say when a buffer was copied.
            reader_threads: reads in flight at most.
        """
        self._layouts = store.layouts
        largest = max(layout.record_bytes for layout in store.layouts)
        self._buffers = region.view(-1, largest)
        self.total_bytes = region.numel()
        self._streams = streams
        self._transfer = DiskTransfer(store, reader_threads=reader_threads)
        self._free = list(range(len(self._buffers)))
        self._lent: deque[tuple[Any, int]] = deque()
        self._demanded: deque[_Staged] = deque()
        self._guessed: deque[_Staged] = deque()
        self._reading: list[_Staged] = []

    def request(self, layer: int, expert: int, *, speculative: bool = False) -> _Staged:
        staged = _Staged(self, layer, expert, speculative)
        (self._guessed if speculative else self._demanded).append(staged)
        self.advance()
        return staged

    def advance(self) -> None:
        """Give free buffers to what waits for one, demanded records first."""
        while self._lent and self._streams.reached(self._lent[0][0]):
            self._free.append(self._lent.popleft()[1])
        for staged in [one for one in self._reading if one.abandoned]:
            if staged.read is not None and staged.read.final:
                self.give_back(staged)
        while self._free and (self._demanded or self._guessed):
            staged = (self._demanded or self._guessed).popleft()
            if staged.abandoned:
                continue
            staged.buffer = self._free.pop()
            record_bytes = self._layouts[staged.layer].record_bytes
            destination = self._buffers[staged.buffer, :record_bytes]
            ticket = self._transfer.start(
                staged.layer, [(staged.expert, destination)], speculative=staged.speculative
            )
            staged.read = ticket.reads[staged.expert]
            self._reading.append(staged)

    def block(self) -> None:
        reads = [staged.read for staged in self._reading if staged.read is not None]
        pending = [read for read in reads if not read.final]
        if pending:
            self._transfer.wait_any(pending)
        elif self._lent:
            self._streams.synchronize(self._lent[0][0])

    def lend_until(self, staged: _Staged, event: Any) -> None:
        """Keep a request's buffer until an event is reached."""
        self._reading.remove(staged)
        self._lent.append((event, staged.buffer))

    def give_back(self, staged: _Staged) -> None:
        """Free the buffer of a request whose record nobody takes."""
        self._reading.remove(staged)
        self._free.append(staged.buffer)

    @property
    def busy_ms(self) -> float:
        """Wall time in which at least one read was in progress."""
        return self._transfer.busy_ms

    def close(self) -> None:
        """End the reader threads; the ring must not be freed before."""
        self._transfer.close()


def staging_bytes(store: ExpertStore, reader_threads: int) -> int:
    """Size of the ring: records of the largest layer, enough to keep the readers busy."""
    largest = max(layout.record_bytes for layout in store.layouts)
    count = min(2 * reader_threads + MIN_BUFFERS, MAX_STAGING_BYTES // largest)
    return max(MIN_BUFFERS, count) * largest
