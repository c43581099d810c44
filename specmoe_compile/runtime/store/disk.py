"""The expert store on disk: a folder with `experts.bin` and `header.json`.

`experts.bin` holds the records back to back, layer-major; every record starts at a multiple of
4096 bytes and is a multiple of 4096 bytes long. `header.json` says what they are, and is written
last, so that a folder with a header is a complete store. Reads use O_DIRECT: they land where the
caller wants them, at the disk's speed, and leave no second copy in the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.experts.layout import RECORD_ALIGNMENT
from specmoe_compile.runtime.store.base import DirectReads, ExpertStore, record_array
from specmoe_compile.runtime.store.header import (
    RECORDS_NAME,
    StoreHeader,
    read_header,
    record_checksum,
)
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.files import avoid_page_cache, drop_cached_pages, pread_into
from specmoe_compile.system.progress import progress_bar

logger = logging.getLogger(__name__)

DIRECT_ALIGNMENT = RECORD_ALIGNMENT  # bytes; memory, offset and length of an O_DIRECT read


class DiskStore(ExpertStore):
    """A store on disk, opened read-only; any number of processes may open the same one.

    Attributes:
        path: the folder.
        header: what the folder says about itself.
        direct: whether reads use O_DIRECT. False where the file system refuses it: reads then go
            through the page cache, whose pages are dropped again after each read, because a cache
            that nobody sized would hide the cost of a miss and count against a memory limit.
    """

    kind = "disk"

    def __init__(self, path: Path, header: StoreHeader, *, verify_reads: bool) -> None:
        """Open the records of a folder whose header was read; use `DiskStore.open`."""
        super().__init__(header.layers, fingerprint=header.fingerprint, top_k=header.top_k)
        self.path = path
        self.header = header
        self._fd, self.direct = _open_records(path / RECORDS_NAME)
        self._local = threading.local()
        self._state = threading.Condition()
        self._readers = 0
        self._closed = False
        # One flag per record: whether its checksum was seen to match in this process.
        self._verified = [bytearray(n) for n in self.num_experts] if verify_reads else None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        expected_fingerprint: str | None = None,
        verify: bool = False,
        verify_reads: bool = True,
    ) -> DiskStore:
        """Open a store; its header and its file size are always checked.

        Args:
            path: the folder.
            expected_fingerprint: if given, the store must have been packed from these weights.
            verify: read everything now and compare all checksums.
            verify_reads: compare a record's checksum the first time it is read. It costs less
                than a tenth of a millisecond per MiB, once, in the thread that reads: reading all
                of an 805 MB store at 2 GB/s took 2 % longer with it than without.

        Raises:
            StoreError: the folder is not a complete store, is damaged, or is another model's.
        """
        folder = Path(path)
        header = read_header(folder)
        if expected_fingerprint is not None and header.fingerprint != expected_fingerprint:
            raise StoreError(
                f"The expert store {folder} was packed from {header.source_name!r} with "
                f"fingerprint {header.fingerprint[:12]}, but the model's is "
                f"{expected_fingerprint[:12]}: it holds other weights or another dtype. Choose "
                "another store_dir, or delete this folder."
            )
        store = cls(folder, header, verify_reads=verify_reads)
        try:
            size_bytes = os.fstat(store._fd).st_size
            if size_bytes != store.total_bytes:
                raise StoreError(
                    f"{folder / RECORDS_NAME} has {size_bytes} bytes, but its header promises "
                    f"{store.total_bytes}: it is truncated or damaged. Delete the folder and "
                    "pack again."
                )
            if verify:
                store.verify()
        except BaseException:
            store.close()
            raise
        return store

    def read_into(self, layer: int, expert: int, record: torch.Tensor | memoryview) -> None:
        offset = self._offset(layer, expert)
        array = record_array(record, self.layouts[layer].record_bytes)
        with self._reading():
            self._read(array, offset)
        if self._verified is not None and not self._verified[layer][expert]:
            self._check(layer, expert, array)
            self._verified[layer][expert] = 1

    def direct_reads_or_none(self) -> DirectReads | None:
        if not self.direct:
            return None
        flags = None if self._verified is None else [memoryview(each) for each in self._verified]
        return DirectReads(self._fd, self._layer_offsets, flags)

    def verify(self, *, progress: bool = False) -> None:
        """Read every record and compare its checksum; raises `StoreError` at the first mismatch."""
        buffer = aligned_empty(max(layout.record_bytes for layout in self.layouts))
        with progress_bar(self.total_bytes, "Verifying store", enabled=progress) as bar:
            for layer, layout in enumerate(self.layouts):
                array = record_array(buffer[: layout.record_bytes], layout.record_bytes)
                for expert in range(self.num_experts[layer]):
                    with self._reading():
                        self._read(array, self._offset(layer, expert))
                    self._check(layer, expert, array)
                    bar.update(layout.record_bytes)

    def close(self) -> None:
        with self._state:
            if self._closed:
                return
            self._closed = True
            # A descriptor closed under a reader could be given to another file meanwhile.
            self._state.wait_for(lambda: self._readers == 0)
            os.close(self._fd)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep the file open while a thread reads from it."""
        with self._state:
            if self._closed:
                raise StoreError(f"The expert store {self.path} is closed.")
            self._readers += 1
        try:
            yield
        finally:
            with self._state:
                self._readers -= 1
                if self._readers == 0:
                    self._state.notify_all()

    def _read(self, array: np.ndarray, offset: int) -> None:
        """Fill `array` from the file at `offset`, by way of an aligned buffer if it must be."""
        if self.direct and array.ctypes.data % DIRECT_ALIGNMENT != 0:
            bounce = self._bounce(array.nbytes)
            self._read_all(bounce, offset)
            np.copyto(array, bounce)
            return
        self._read_all(array, offset)
        if not self.direct:
            drop_cached_pages(self._fd, offset, array.nbytes)

    def _read_all(self, array: np.ndarray, offset: int) -> None:
        """Read until `array` is full."""
        done = 0
        while done < array.nbytes:
            try:
                count = pread_into(self._fd, array[done:].data, offset + done)
            except OSError as error:
                raise StoreError(
                    f"Reading {array.nbytes} bytes at {offset} of {self.path / RECORDS_NAME} "
                    f"failed: {error.strerror or error}."
                ) from error
            if count == 0:
                raise StoreError(
                    f"{self.path / RECORDS_NAME} ends at byte {offset + done}, inside a record: it "
                    "was truncated after it was opened. Pack it again."
                )
            done += count
            if self.direct and done < array.nbytes:
                # O_DIRECT goes on only at an aligned place; bytes after it are read again.
                done -= done % DIRECT_ALIGNMENT

    def _bounce(self, size_bytes: int) -> np.ndarray:
        """Return this thread's aligned buffer of at least `size_bytes`, cut to that size."""
        buffer: np.ndarray | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.nbytes < size_bytes:
            buffer = aligned_empty(size_bytes).numpy()
            self._local.buffer = buffer
        return buffer[:size_bytes]

    def _check(self, layer: int, expert: int, array: np.ndarray) -> None:
        """Compare a record's checksum; raises `StoreError`."""
        if record_checksum(array) != self.header.checksums[layer][expert]:
            raise StoreError(
                f"The record of layer {layer} ({self.layers[layer].name}), expert {expert} in "
                f"{self.path / RECORDS_NAME} does not match its checksum: the file is corrupt. "
                "Delete the folder and pack again."
            )


def _open_records(path: Path) -> tuple[int, bool]:
    """Open a records file read-only; returns its descriptor and whether it uses O_DIRECT."""
    reason = "this system has no O_DIRECT"
    if hasattr(os, "O_DIRECT"):
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            # Some file systems accept the flag and refuse the read.
            pread_into(fd, aligned_empty(DIRECT_ALIGNMENT).numpy().data, 0)
            return fd, True
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
            reason = f"the file system refuses O_DIRECT ({error.strerror})"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    if not avoid_page_cache(fd):
        logger.warning(
            "%s is read through the page cache, because %s; reads cost one more copy.", path, reason
        )
    return fd, False
