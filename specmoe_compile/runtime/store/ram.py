"""The expert store in RAM: every record in one page-aligned region of exactly their size.

One region, so that CUDA can register it in one call and a kernel can read it by its address.
"""

from __future__ import annotations

import numpy as np
import torch

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.store.base import ExpertStore, RecordSource, record_array
from specmoe_compile.runtime.store.source_content import SourceContent
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.machine import one_compute_thread
from specmoe_compile.system.numa import prefer_node
from specmoe_compile.system.progress import progress_bar


class RamStore(ExpertStore):
    """Records in RAM. `region` is all of them, [total_bytes] uint8, layer-major."""

    kind = "ram"

    def __init__(self, source: RecordSource, *, numa_node: int | None = None) -> None:
        """Reserve memory for the records of `source`, on a NUMA node if given; fills nothing."""
        super().__init__(source.layers, fingerprint=source.fingerprint, top_k=source.top_k)
        self._region: torch.Tensor | None = aligned_empty(self.total_bytes)
        if numa_node is not None:
            prefer_node(self._region, numa_node)

    @classmethod
    def from_source(
        cls, source: RecordSource, *, progress: bool = True, numa_node: int | None = None
    ) -> RamStore:
        """Fill a store from a checkpoint or from a model in memory, expert by expert."""
        store = cls(source, numa_node=numa_node)
        with (
            one_compute_thread(),
            progress_bar(store.total_bytes, "Loading experts", enabled=progress) as bar,
        ):
            for layer in range(len(store.layers)):
                for expert in range(store.num_experts[layer]):
                    source.fill(layer, expert, store.record(layer, expert))
                    bar.update(store.layouts[layer].record_bytes)
        return store

    @classmethod
    def from_store(
        cls, other: ExpertStore, *, progress: bool = True, numa_node: int | None = None
    ) -> RamStore:
        """Copy another store's records, checksums verified if it verifies them on reading."""
        return cls.from_source(_StoreSource(other), progress=progress, numa_node=numa_node)

    @property
    def region(self) -> torch.Tensor:
        """All records back to back, [total_bytes] uint8, at a page-aligned address."""
        if self._region is None:
            raise StoreError("The expert store in RAM is closed.")
        return self._region

    def record(self, layer: int, expert: int) -> torch.Tensor:
        offset = self._offset(layer, expert)
        return self.region[offset : offset + self.layouts[layer].record_bytes]

    def layer_records(self, layer: int) -> torch.Tensor:
        """Return a layer's records as one bank, [E, record_bytes] uint8, without a copy."""
        offset = self._offset(layer, 0)
        size_bytes = self.layers[layer].total_bytes
        return self.region[offset : offset + size_bytes].view(self.num_experts[layer], -1)

    def read_into(self, layer: int, expert: int, record: torch.Tensor | memoryview) -> None:
        source = self.record(layer, expert)
        np.copyto(record_array(record, source.numel()), source.numpy())

    def close(self) -> None:
        # Views that a session still holds keep the memory alive until they go.
        self._region = None


class _StoreSource:
    """Another store, seen as the source of records."""

    def __init__(self, store: ExpertStore) -> None:
        self.layers = store.layers
        self.fingerprint = store.fingerprint
        self.top_k = store.top_k
        self.name: str = store.kind
        self.source_files: dict[str, tuple[int, int]] = {}
        self.content: SourceContent | None = None
        self._store = store

    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        self._store.read_into(layer, expert, record)


def all_records(store: ExpertStore) -> list[torch.Tensor]:
    """Records of each layer, [E, record_bytes] uint8, of a store that is in RAM."""
    assert isinstance(store, RamStore), "a store on disk needs a supply"
    return [store.layer_records(layer) for layer in range(len(store.layouts))]
