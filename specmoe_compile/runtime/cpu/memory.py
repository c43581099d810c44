"""The fast tier's memory on the CPU: cache slots, double buffers and the staging ring.

Everything is page-aligned, so that O_DIRECT reads land where the experts are computed from. Pages
are given by the kernel when they are first written: reserved memory that is never used costs none.

Shape letters: E experts, K top-k, L MoE layers, S slots per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from specmoe_compile.runtime.cache.spare_places import SparePlaces
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.experts.layout import ExpertLayout
from specmoe_compile.runtime.transfer.base import Read
from specmoe_compile.system.aligned import aligned_empty

Allocate = Callable[[int], torch.Tensor]

MAX_STAGING_BYTES = 256 << 20
_POISON_BYTE = 0xFF  # every float made of such bytes is a NaN


class SlotMemory:
    """Records of cached experts: a bank per layer, or a few banks that layers take turns with.

    Attributes:
        bank_of: which bank each layer uses, [L].
        poison: fill a slot with NaNs when it is given to another expert; for tests.
    """

    def __init__(
        self,
        runners: Sequence[ExpertRunner],
        layouts: Sequence[ExpertLayout],
        slots: Sequence[int],
        *,
        shared_banks: int | None = None,
        allocate: Allocate = aligned_empty,
    ) -> None:
        """Reserve memory.

        Args:
            runners: of each layer.
            layouts: of each layer.
            slots: S of each layer.
            shared_banks: if given, layer l uses bank l % shared_banks and its slots there.
            allocate: makes memory of a size in bytes, [bytes] uint8.
        """
        layers = range(len(layouts))
        banks = len(layouts) if shared_banks is None else min(shared_banks, len(layouts))
        self.bank_of = tuple(layer % banks for layer in layers)
        self.slots = tuple(slots)
        self.poison = False
        self._runners = runners
        sizes = [0] * banks
        for layer in layers:
            bank = self.bank_of[layer]
            sizes[bank] = max(sizes[bank], slots[layer] * layouts[layer].record_bytes)
        memory = [allocate(size) for size in sizes]
        self.total_bytes = sum(sizes)
        self._banks = [
            memory[self.bank_of[layer]][: slots[layer] * layouts[layer].record_bytes].view(
                slots[layer], layouts[layer].record_bytes
            )
            for layer in layers
        ]
        self._weights: list[list[ExpertTensors | None]] = [
            [None] * slots[layer] for layer in layers
        ]

    def address(self, layer: int) -> int:
        """Return where a layer's slots begin; they lie back to back."""
        return self._banks[layer].data_ptr()

    def record(self, layer: int, slot: int) -> torch.Tensor:
        """Return a slot's memory to read into, [record_bytes] uint8."""
        record = self._banks[layer][slot]
        if self.poison:
            record.fill_(_POISON_BYTE)
        return record

    def weights(self, layer: int, slot: int) -> ExpertTensors:
        """Return a slot as tensors; what they hold is whatever was read into it last."""
        weights = self._weights[layer][slot]
        if weights is None:
            weights = self._runners[layer].weights(self._banks[layer][slot])
            self._weights[layer][slot] = weights
        return weights


class StagingRing:
    """A few record buffers for experts that get no slot: read, computed from, kept for a while.

    Attributes:
        buffers: how many there are.
        places: whose records they hold.
        stride_bytes: from one buffer to the next.
        poison: fill a buffer with NaNs when it is given to another expert; for tests.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        *,
        buffers: int,
        allocate: Allocate = aligned_empty,
    ) -> None:
        """Reserve `buffers` records of the largest layer, fewer if they pass MAX_STAGING_BYTES."""
        self.stride_bytes = max(layout.record_bytes for layout in layouts)
        self.buffers = count = max(2, min(buffers, MAX_STAGING_BYTES // self.stride_bytes))
        self.total_bytes = count * self.stride_bytes
        self.poison = False
        self.places = SparePlaces(count)
        self._memory = allocate(self.total_bytes).view(count, self.stride_bytes)
        self._layouts = layouts
        self._users: list[Read | None] = [None] * count
        self._abandoned: list[int] = []

    def address(self) -> int:
        """Return where the buffers begin."""
        return self._memory.data_ptr()

    def acquire_or_none(self, layer: int, expert: int) -> tuple[int, torch.Tensor] | None:
        """Take a free buffer for a record: (buffer, [record_bytes] uint8)."""
        self._reclaim()
        buffer = self.places.take(layer, expert)
        if buffer < 0:
            return None
        record = self._record(layer, buffer)
        if self.poison:
            record.fill_(_POISON_BYTE)
        return buffer, record

    def held_or_none(self, layer: int, expert: int) -> tuple[int, torch.Tensor] | None:
        """Take the buffer that still holds a record: (buffer, [record_bytes] uint8)."""
        buffer = self.places.find(layer, expert)
        if buffer < 0:
            return None
        self.places.use(buffer)
        return buffer, self._record(layer, buffer)

    def lend(self, buffer: int, read: Read) -> None:
        """Say which read fills a buffer."""
        self._users[buffer] = read

    def release(self, buffer: int) -> None:
        """Give back a buffer that is not computed from any more and whose read is final."""
        self._users[buffer] = None
        self.places.release(buffer)

    def abandon(self, buffer: int) -> None:
        """Give back a buffer that a read may still write to; it is free once the read is final."""
        self.places.forget(buffer)
        read = self._users[buffer]
        if read is None or read.final:
            self.release(buffer)
        else:
            self._abandoned.append(buffer)

    def busy_reads(self) -> list[Read]:
        """Return the reads that keep abandoned buffers."""
        return [read for b in self._abandoned if (read := self._users[b]) is not None]

    def _record(self, layer: int, buffer: int) -> torch.Tensor:
        return self._memory[buffer][: self._layouts[layer].record_bytes]

    def _reclaim(self) -> None:
        still: list[int] = []
        for buffer in self._abandoned:
            read = self._users[buffer]
            if read is None or read.final:
                self.release(buffer)
            else:
                still.append(buffer)
        self._abandoned = still
