"""One rank's part of the experts: of a store that several processes share, or of a source.

Rank r of N has the experts r * E / N to (r + 1) * E / N - 1 of each layer, numbered from 0.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.runtime.experts.layout import StoreLayer
from specmoe_compile.runtime.store.base import DirectReads, ExpertStore, RecordSource


class SliceStore(ExpertStore):
    """A rank's experts in a store of all; reads no others. Closes the store with itself.

    Attributes:
        whole: the store of all experts.
    """

    def __init__(self, whole: ExpertStore, rank: int, size: int) -> None:
        """Take the part of rank `rank` of `size`; `UnsupportedModelError` if uneven."""
        layers = slice_layers(whole.layers, size)
        super().__init__(layers, fingerprint=whole.fingerprint, top_k=whole.top_k)
        self.kind = whole.kind
        self.whole = whole
        self._rank = rank

    def read_into(self, layer: int, expert: int, record: torch.Tensor | memoryview) -> None:
        self._offset(layer, expert)  # refuses an expert that is not this rank's
        self.whole.read_into(layer, self._rank * self.num_experts[layer] + expert, record)

    def direct_reads_or_none(self) -> DirectReads | None:
        reads = self.whole.direct_reads_or_none()
        if reads is None:
            return None
        firsts = [self._rank * experts for experts in self.num_experts]
        offsets = [
            offset + first * layout.record_bytes
            for offset, first, layout in zip(reads.offsets, firsts, self.layouts, strict=True)
        ]
        verified = None
        if reads.verified is not None:
            parts = zip(reads.verified, firsts, self.num_experts, strict=True)
            verified = [flags[first : first + experts] for flags, first, experts in parts]
        return DirectReads(reads.fd, tuple(offsets), verified)

    def close(self) -> None:
        self.whole.close()


class SliceSource:
    """A rank's experts of a source of records, to be filled into a store in RAM."""

    def __init__(self, whole: RecordSource, rank: int, size: int) -> None:
        """Take the part of rank `rank` of `size`; `UnsupportedModelError` if uneven."""
        self.layers = slice_layers(whole.layers, size)
        self.fingerprint = whole.fingerprint
        self.name = whole.name
        self.top_k = whole.top_k
        self.source_files = whole.source_files
        self.content = whole.content
        self._whole = whole
        self._rank = rank

    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        self._whole.fill(layer, self._rank * self.layers[layer].num_experts + expert, record)


def slice_layers(layers: Sequence[StoreLayer], size: int) -> tuple[StoreLayer, ...]:
    """The layers of one rank of `size`.

    Raises:
        UnsupportedModelError: a layer's experts do not divide evenly.
    """
    return tuple(replace(each, num_experts=own_experts(each.num_experts, size)) for each in layers)


def own_experts(num_experts: int, size: int) -> int:
    """How many of a layer's experts each of `size` ranks has; raises `UnsupportedModelError`."""
    if num_experts % size:
        raise UnsupportedModelError(
            f"{num_experts} experts cannot be split evenly over {size} ranks: start as many"
            " processes as divide the experts."
        )
    return num_experts // size
