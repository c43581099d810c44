"""The expert store: the slow tier, which holds one record per (layer, expert) and is read-only.

`layer` is the MoE layer's ordinal, 0..L-1. A record's tensors and padding are those of
`ExpertLayout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer
from specmoe_compile.runtime.store.source_content import SourceContent


class RecordSource(Protocol):
    """Where records come from when a store is filled: a checkpoint, or a model in memory.

    Attributes:
        layers, top_k: what there is.
        fingerprint: hex digest that finds a store again. It names shapes and samples of the
            weights; that all bytes are the same, `content` tells.
        name: for people.
        source_files: the checkpoint's files, `{path: (bytes, mtime_ns)}`, empty without one.
        content: hashes of the bytes that records are made from; None for a source that has no
            files, which is compared record by record.
    """

    layers: tuple[StoreLayer, ...]
    fingerprint: str
    name: str
    top_k: int
    source_files: dict[str, tuple[int, int]]
    content: SourceContent | None

    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        """Write one expert's tensors into `record` ([record_bytes] uint8, CPU, contiguous).

        Padding is left as it is. Experts of a layer are asked for in order, layer by layer.
        """


class DirectReads(NamedTuple):
    """What a reader outside Python needs.

    Attributes:
        fd: of the records' file, opened with O_DIRECT.
        offsets: of each layer's first record, in bytes.
        verified: of each layer, whether a record's checksum was seen to match, one byte each; None
            if nobody asks.
    """

    fd: int
    offsets: tuple[int, ...]
    verified: list[memoryview] | None


class ExpertStore(ABC):
    """Read-only records of every expert, in RAM or on disk.

    Attributes:
        kind: "disk" or "ram".
        layers: what is stored, by MoE layer.
        fingerprint: hex digest that finds the store of some weights in a record format.
        top_k: K, the most experts that one token uses in a layer.
        total_bytes: bytes of all records, with padding.
        numbers: what experts' weights are, for people; several where layers differ.
        record_bytes: of one expert; the mean where layers differ.
    """

    kind: Literal["disk", "ram"]

    def __init__(self, layers: Sequence[StoreLayer], *, fingerprint: str, top_k: int) -> None:
        self.layers = tuple(layers)
        self.fingerprint = fingerprint
        self.top_k = top_k
        self.layouts: tuple[ExpertLayout, ...] = tuple(layer.layout for layer in self.layers)
        self.num_experts: tuple[int, ...] = tuple(layer.num_experts for layer in self.layers)
        self.total_bytes = total_bytes_of(self.layers)
        self.numbers = " and ".join(dict.fromkeys(layout.numbers for layout in self.layouts))
        self.record_bytes = self.total_bytes // max(1, sum(self.num_experts))
        self._layer_offsets = layer_offsets(self.layers)

    @abstractmethod
    def read_into(self, layer: int, expert: int, record: torch.Tensor | memoryview) -> None:
        """Copy one record into `record`, blocking; safe to call from several threads at once.

        Args:
            layer: MoE layer ordinal.
            expert: expert number in that layer.
            record: [record_bytes] uint8, CPU, contiguous, writable. Page-aligned memory is read
                into directly; any other costs one more copy on a store that uses O_DIRECT.

        Raises:
            StoreError: the store is closed, or its data cannot be read or is corrupt.
            ValueError: there is no such expert, or `record` has the wrong size.
        """

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """Return one record without a copy, [record_bytes] uint8; only a store in RAM can."""
        raise StoreError(
            f"A store on {self.kind} has no record in memory for layer {layer}, expert {expert}; "
            "use read_into."
        )

    def direct_reads_or_none(self) -> DirectReads | None:
        """What a reader outside Python needs, which must have ended before `close`; None: none."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give up files and memory; later reads raise `StoreError`. May be called again."""

    def _offset(self, layer: int, expert: int) -> int:
        """Return where a record starts, in bytes; raises `ValueError` for an expert not there."""
        if not 0 <= layer < len(self.layers) or not 0 <= expert < self.num_experts[layer]:
            counts = f"{len(self.layers)} layers"
            if 0 <= layer < len(self.layers):
                counts = f"{self.num_experts[layer]} experts in this layer"
            raise ValueError(f"No expert {expert} in MoE layer {layer}: the store has {counts}.")
        return self._layer_offsets[layer] + expert * self.layouts[layer].record_bytes


def total_bytes_of(layers: Sequence[StoreLayer]) -> int:
    """Bytes of all records of these layers."""
    return sum(layer.total_bytes for layer in layers)


def layer_offsets(layers: Sequence[StoreLayer]) -> tuple[int, ...]:
    """Return where each layer's records start, in bytes: records lie back to back, layer-major."""
    offsets: list[int] = []
    offset = 0
    for layer in layers:
        offsets.append(offset)
        offset += layer.total_bytes
    return tuple(offsets)


def record_array(record: torch.Tensor | memoryview, record_bytes: int) -> np.ndarray:
    """Return a destination as a writable [record_bytes] uint8 array over the same memory.

    Raises:
        ValueError: wrong size, dtype or device, not contiguous, or read-only.
    """
    if isinstance(record, torch.Tensor):
        if record.dtype != torch.uint8 or record.device.type != "cpu":
            raise ValueError(
                f"A record is uint8 on the CPU; got {record.dtype} on {record.device}."
            )
        if not record.is_contiguous():
            raise ValueError("A record must be contiguous.")
        array = record.detach().numpy().reshape(-1)
    else:
        array = np.frombuffer(record, dtype=np.uint8)
    if array.nbytes != record_bytes:
        raise ValueError(f"A record of this layer has {record_bytes} bytes; got {array.nbytes}.")
    if not array.flags.writeable:
        raise ValueError("A record to read into must be writable.")
    return array
