"""Whether a store on disk holds the very experts of a source, byte by byte of what was packed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.store.base import ExpertStore, RecordSource
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.header import HEADER_NAME, read_header, record_checksum
from specmoe_compile.runtime.store.known_files import (
    FileIdentity,
    recall,
    remember,
    settled_identity_or_none,
)
from specmoe_compile.runtime.store.source_content import SourceContent
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.machine import one_compute_thread
from specmoe_compile.system.progress import progress_bar

_PART = "packed from"  # what is remembered of a header: a hash of what its store was packed from


def open_matching(
    source: RecordSource, folder: Path, *, verify: bool = False, progress: bool = False
) -> DiskStore:
    """Open the store of `source`; nothing is written to its folder.

    A checkpoint's bytes are compared by their hashes: for files that are known to be unchanged this
    costs nothing, others are read. A store that has no hashes (of a model in memory, or written
    before there were any) is compared record by record, once for each state of a checkpoint.

    Raises:
        StoreError: the folder has no complete store, or it is damaged or of other weights.
    """
    store = DiskStore.open(folder, expected_fingerprint=source.fingerprint, verify=verify)
    try:
        if store.layers != tuple(source.layers):
            # A fingerprint is only text in a file; these sizes are what memory is read with.
            raise StoreError(
                f"The expert store {folder} says that it is {source.name}'s, and has other layers:"
                " its header was altered. Delete the folder and pack again."
            )
        _check_content(source, store, progress=progress)
    except BaseException:
        store.close()
        raise
    return store


def open_packed(source: RecordSource, folder: Path, *, verify: bool = False) -> DiskStore:
    """Open a store that was just found or packed for `source`.

    Another process may have packed a changed checkpoint into the folder meanwhile; of files whose
    hashes are known by now, that is looked at once more.

    Raises:
        StoreError: as `open_matching`.
    """
    store = DiskStore.open(folder, expected_fingerprint=source.fingerprint, verify=verify)
    packed = store.header.packed_from
    if source.content is not None and packed and not source.content.equals(packed):
        store.close()
        raise _other_weights(source, folder)
    return store


def belongs_to_others(source: RecordSource, folder: Path, *, progress: bool = False) -> bool:
    """Return whether a folder holds the sound store of other files with other experts."""
    try:
        header = read_header(folder)
        if header.source_files.keys() == source.source_files.keys():
            return False
        DiskStore.open(folder).close()
    except StoreError:
        return False
    try:
        open_matching(source, folder, progress=progress).close()
    except StoreError:
        return True
    return False


def check_store(layers: Sequence[ExpertsLayer], store: ExpertStore) -> None:
    """Raise `ValueError` when a store does not hold the experts of these layers."""
    wanted = [(layer.num_experts, layer.layout) for layer in layers]
    stored = list(zip(store.num_experts, store.layouts, strict=True))
    if wanted != stored:
        raise ValueError(
            f"The expert store holds {len(stored)} MoE layers with other shapes than the model's"
            f" {len(wanted)}: it was made from another model."
        )


def _check_content(source: RecordSource, store: DiskStore, *, progress: bool) -> None:
    """Raise `StoreError` if the store was packed from other bytes."""
    content = source.content
    if content is None:
        _compare_records(source, store, progress=progress)
    elif store.header.packed_from:
        if not content.equals(store.header.packed_from, progress=progress):
            raise _other_weights(source, store.path)
    else:
        _compare_once(source, content, store, progress=progress)


def _compare_once(
    source: RecordSource, content: SourceContent, store: DiskStore, *, progress: bool
) -> None:
    """Compare a store without hashes record by record, unless that was done before."""
    path = store.path / HEADER_NAME
    opened_ns = time.time_ns()
    with open(path, "rb") as file:
        identity = FileIdentity.of(os.fstat(file.fileno()))
        known = recall(path, _PART, identity)
        if known is not None and known == content.combined(progress=progress):
            return
        with content.hashing_reads():
            _compare_records(source, store, progress=progress)
        if settled_identity_or_none(file.fileno(), identity, opened_ns) is not None:
            remember(path, _PART, identity, content.combined(progress=progress))


def _compare_records(source: RecordSource, store: DiskStore, *, progress: bool) -> None:
    """Raise `StoreError` at the first record whose checksum differs."""
    with (
        one_compute_thread(),
        progress_bar(store.total_bytes, "Comparing store", enabled=progress) as bar,
    ):
        for layer, spec in enumerate(source.layers):
            buffer = aligned_empty(spec.layout.record_bytes)
            for expert in range(spec.num_experts):
                source.fill(layer, expert, buffer)
                if record_checksum(buffer.numpy()) != store.header.checksums[layer][expert]:
                    raise _other_weights(source, store.path, f" in layer {layer}, expert {expert}")
                bar.update(spec.layout.record_bytes)


def _other_weights(source: RecordSource, folder: Path, where: str = "") -> StoreError:
    return StoreError(
        f"The expert store {folder} differs from {source.name}{where}: the weights were changed "
        "since it was packed, or are another model's. Choose another store_dir, or delete this "
        "folder."
    )
