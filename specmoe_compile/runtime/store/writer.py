"""Writing an expert store to disk: bounded memory, survives a kill, one writer at a time.

Records go to `experts.bin.partial`; after each layer they are made durable and `packing.journal`
notes their checksums, so that a pack which was killed goes on at the first layer that is missing.
At the end the records get their name, and then the header: a folder with a header is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.store.base import RecordSource, layer_offsets, total_bytes_of
from specmoe_compile.runtime.store.header import (
    HEADER_NAME,
    RECORDS_NAME,
    StoreHeader,
    header_text,
    record_checksum,
    sync_folder,
)
from specmoe_compile.runtime.store.journal import (
    JOURNAL_NAME,
    PARTIAL_NAME,
    begin_journal,
    finished_layers,
    note_layer,
    open_journal,
)
from specmoe_compile.runtime.store.known_files import FileIdentity
from specmoe_compile.runtime.store.matching import open_matching
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.files import avoid_page_cache, sync_data
from specmoe_compile.system.machine import one_compute_thread
from specmoe_compile.system.progress import Phase, progress_bar
from specmoe_compile.system.sizes import format_bytes

logger = logging.getLogger(__name__)

_LOCK_NAME = "packing.lock"
_DISK_MARGIN_BYTES = 16 << 20  # header, journal, and the file system's own blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """What `pack` did.

    Attributes:
        path: the store's folder.
        reused: the folder held this very store already; nothing was written.
        resumed_layers: layers that a killed pack had already written.
        layers, experts: L, and the number of records.
        total_bytes: bytes of all records.
        seconds: wall-clock time of packing, without resolving the model.
    """

    path: Path
    reused: bool
    resumed_layers: int
    layers: int
    experts: int
    total_bytes: int
    seconds: float


def pack_records(
    source: RecordSource, folder: Path, *, progress: bool = True, replace: bool = False
) -> StoreReport:
    """Write the records of `source` into a store on disk, unless the folder holds them already.

    Args:
        source: a checkpoint, or a model in memory.
        folder: created if it is not there. Other files in it are left alone.
        progress: say on standard error how far it is.
        replace: pack anew if the folder holds a store that is damaged or of other weights.

    Raises:
        StoreError: the folder cannot be written or holds another store, or the disk is full. What
            was written so far is removed then; after a kill it is kept and used.
    """
    started = time.monotonic()
    resumed = 0
    # Nobody writes to a complete store, so that nobody needs to lock it: it may lie on a read-only
    # mount, belong to another user, or be where there are no locks.
    seen = _header_state_or_none(folder)
    reused = _holds(source, folder, replace=replace, progress=progress)
    if not reused:
        created = _make_folder(folder)
        with _packing_lock(folder, created=created), one_compute_thread():
            if _header_state_or_none(folder) != seen:  # another process has packed meanwhile
                reused = _holds(source, folder, replace=replace, progress=progress)
            if not reused:
                resumed = _pack_or_clean_up(source, folder, created=created, progress=progress)
    return StoreReport(
        path=folder,
        reused=reused,
        resumed_layers=resumed,
        layers=len(source.layers),
        experts=sum(layer.num_experts for layer in source.layers),
        total_bytes=total_bytes_of(source.layers),
        seconds=time.monotonic() - started,
    )


def _pack_or_clean_up(source: RecordSource, folder: Path, *, created: bool, progress: bool) -> int:
    """Pack; returns how many layers were there. Removes what was written if that fails."""
    try:
        return _pack_locked(source, folder, progress=progress)
    except OSError as error:
        _remove_partial(folder, created=created)
        raise _disk_error(error, source, folder) from error
    except Exception:
        _remove_partial(folder, created=created)
        raise


def _header_state_or_none(folder: Path) -> FileIdentity | None:
    """Return what tells one header in a folder from another; None without one."""
    try:
        return FileIdentity.of((folder / HEADER_NAME).stat())
    except OSError:
        return None


def refuse_file(folder: Path) -> None:
    """Raise `StoreError` where a store's folder is to be and something else is."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(
            f"The store folder {folder} cannot be created: a file of that name is in the way."
        )


def _make_folder(folder: Path) -> bool:
    """Create the folder if needed; returns whether it was. Raises `StoreError`."""
    if folder.is_dir():
        return False
    refuse_file(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if folder.is_dir():  # another process was faster, such as the next rank
            return False
        raise StoreError(
            f"The store folder {folder} cannot be created: {error.strerror}. Choose a store_dir "
            "that is writable."
        ) from error
    return True


@contextlib.contextmanager
def _packing_lock(folder: Path, *, created: bool) -> Iterator[None]:
    """Hold the folder's lock; it goes with the process, so a killed one leaves none behind.

    Raises:
        StoreError: the folder is not writable, or its file system has no locks.
    """
    try:
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(
            f"The store folder {folder} is not writable: {error.strerror}. Choose another "
            "store_dir."
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("Another process packs into %s; waiting for it to finish.", folder)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            _remove_partial(folder, created=created)
            raise StoreError(
                f"The store folder {folder} cannot be locked ({error.strerror}), so that two "
                "processes could pack into it at once. Pack into a folder on a local disk and copy "
                "it there: a complete store needs no lock."
            ) from error
        yield
    finally:
        os.close(fd)


def _holds(source: RecordSource, folder: Path, *, replace: bool, progress: bool) -> bool:
    """Return whether the folder holds the store of `source`; raises `StoreError` for another one.

    With `replace`, a store that does not match is given up instead: returns False.
    """
    if not (folder / HEADER_NAME).exists():
        return False
    try:
        open_matching(source, folder, progress=progress).close()
        return True
    except StoreError as error:
        if not replace:
            raise
        logger.warning("Packing %s anew: %s", folder, error)
        return False


def _pack_locked(source: RecordSource, folder: Path, *, progress: bool) -> int:
    """Write records, then the header; returns how many layers were there already."""
    content = source.content
    with contextlib.nullcontext() if content is None else content.hashing_reads():
        checksums, resumed = _write_records(source, folder, progress=progress)
    header = StoreHeader(
        layers=source.layers,
        top_k=source.top_k,
        fingerprint=source.fingerprint,
        source_name=source.name,
        source_files=source.source_files,
        checksums=tuple(tuple(values) for values in checksums),
        packed_from=() if content is None else content.files(progress=progress),
    )
    _publish(folder, header)
    return resumed


def _write_records(
    source: RecordSource, folder: Path, *, progress: bool
) -> tuple[list[list[int]], int]:
    """Write what an earlier pack has not; returns checksums, and how many layers were there."""
    checksums = finished_layers(source, folder)
    resumed = len(checksums)
    _check_free_disk(source, folder)
    offsets = (*layer_offsets(source.layers), total_bytes_of(source.layers))
    fd = _open_for_writing(folder / PARTIAL_NAME)
    journal = open_journal(folder)
    try:
        with progress_bar(offsets[-1], f"Packing {source.name}", enabled=progress) as bar:
            os.ftruncate(fd, offsets[resumed])
            if resumed == 0:
                begin_journal(journal, source)
            bar.update(offsets[resumed])
            for layer in range(resumed, len(source.layers)):
                checksums.append(_write_layer(source, layer, fd, offsets[layer], bar))
                sync_data(fd)
                note_layer(journal, source, layer, checksums[-1])
    finally:
        os.close(journal)
        os.close(fd)
    return checksums, resumed


def _write_layer(source: RecordSource, layer: int, fd: int, offset: int, bar: Phase) -> list[int]:
    """Write one layer's records at `offset`; returns their checksums."""
    spec = source.layers[layer]
    record_bytes = spec.layout.record_bytes
    buffer = aligned_empty(record_bytes)  # zeroed: padding must not depend on what was there
    array = buffer.numpy()
    checksums: list[int] = []
    for expert in range(spec.num_experts):
        source.fill(layer, expert, buffer)
        checksums.append(record_checksum(array))
        _write_all(fd, array, offset + expert * record_bytes)
        bar.update(record_bytes)
    return checksums


def _write_all(fd: int, array: np.ndarray, offset: int) -> None:
    done = 0
    while done < array.nbytes:
        count = os.pwrite(fd, array[done:].data, offset + done)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count


def _open_for_writing(path: Path) -> int:
    """Open the records file; with O_DIRECT where it is possible, else through the page cache.

    O_DIRECT keeps a pack of many gigabytes from pushing everything else out of memory.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    if hasattr(os, "O_DIRECT"):
        fd = -1
        try:
            fd = os.open(path, flags | os.O_DIRECT, 0o644)
            os.pwrite(fd, aligned_empty(4096).numpy().data, os.fstat(fd).st_size // 4096 * 4096)
            return fd
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            logger.debug("%s is written through the page cache: %s", path, error)
    fd = os.open(path, flags, 0o644)
    avoid_page_cache(fd)
    return fd


def _check_free_disk(source: RecordSource, folder: Path) -> None:
    """Raise `StoreError` if the records cannot fit; bytes of a partial file count as free."""
    partial = folder / PARTIAL_NAME
    present = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(folder).free + present
    need = total_bytes_of(source.layers) + _DISK_MARGIN_BYTES
    if free < need:
        raise StoreError(
            f"Not enough free disk to pack {source.name} into {folder}: the experts need "
            f"{format_bytes(need)}, {format_bytes(free)} are free. Free some space, or choose a "
            "store_dir on another disk."
        )


def _publish(folder: Path, header: StoreHeader) -> None:
    """Give the records and then the header their names."""
    temporary = folder / f"{HEADER_NAME}.partial"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(header_text(header))
        file.flush()
        os.fsync(file.fileno())
    # Between the two renames the folder must not look complete with another store's header.
    (folder / HEADER_NAME).unlink(missing_ok=True)
    os.rename(folder / PARTIAL_NAME, folder / RECORDS_NAME)
    os.rename(temporary, folder / HEADER_NAME)
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    sync_folder(folder)


def _remove_partial(folder: Path, *, created: bool) -> None:
    """Remove what an unfinished pack wrote, and the folder if it was made for it."""
    names = [PARTIAL_NAME, JOURNAL_NAME, f"{HEADER_NAME}.partial"]
    for name in [*names, _LOCK_NAME] if created else names:
        (folder / name).unlink(missing_ok=True)
    if created:
        with contextlib.suppress(OSError):  # somebody put a file of their own there meanwhile
            folder.rmdir()


def _disk_error(error: OSError, source: RecordSource, folder: Path) -> StoreError:
    """Say in one sentence that the disk is full, or what else it refused."""
    size = format_bytes(total_bytes_of(source.layers))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"The disk became full while packing {source.name} into {folder}, which needs "
            f"{size}; what was written has been removed. Free some space, or choose a store_dir on "
            "another disk."
        )
    if error.errno == errno.EFBIG:
        return StoreError(
            f"The store of {source.name} in {folder}, of {size}, is "
            "larger than a file may be here (ulimit -f, or the file system); what was written has "
            "been removed. Raise the limit, or choose a store_dir on another disk."
        )
    return StoreError(f"Packing {source.name} into {folder} failed: {error.strerror or error}.")
