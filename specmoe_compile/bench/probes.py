"""What the machine can move: bytes per second from disk, from memory and to a GPU.

The disk probe is independent of the runtime: plain threads, plain `preadv`, so that the runtime can
be held against it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specmoe_compile.runtime.store.header import RECORDS_NAME
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.files import avoid_page_cache, drop_cached_pages, pread_into

_WRITE_BYTES = 8 << 20
_WARM_UP_S = 0.3
_PLACES = 8  # per reader, as many slots take turns


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Bandwidth of random whole-record reads.

    Attributes:
        direct: whether the reads used O_DIRECT; without it the page cache may have helped.
        record_bytes: size of a read.
        file_bytes: size of the file read from.
        source: what was read, "store" or "temporary file".
        gbps: 1e9 bytes per second, by number of reader threads.
    """

    direct: bool
    record_bytes: int
    file_bytes: int
    source: Literal["store", "temporary file"]
    gbps: dict[int, float]


def disk_rates(
    folder: Path,
    *,
    record_bytes: int,
    threads: tuple[int, ...],
    file_bytes: int,
    seconds: float,
    on_step: Callable[[str], None] = lambda what: None,
) -> DiskRates:
    """Measure reads of records at random places of an expert store, or of a temporary file.

    A file that was just written can be faster than one that has been there: a virtual disk keeps
    it in its host's memory, a solid-state one in a faster part of its own.

    Args:
        folder: an expert store, or a folder on the disk to measure, which must be writable.
        record_bytes: multiple of 4096.
        threads: numbers of readers to try.
        file_bytes: size of the temporary file, at least one record per thread.
        seconds: time for each number of readers, after a short warm-up.
        on_step: told what happens next.
    """
    records = max(max(threads), file_bytes // record_bytes)
    source: Literal["store", "temporary file"] = "temporary file"
    opened: AbstractContextManager[Path] = _probe_file(folder, records * record_bytes, on_step)
    if is_store(folder, record_bytes, threads):
        source, opened = "store", contextlib.nullcontext(folder / RECORDS_NAME)
        records = (folder / RECORDS_NAME).stat().st_size // record_bytes
    with opened as path:
        fd, direct = _open(path)
        try:
            gbps = {}
            for count in threads:
                on_step(f"reading with {count} threads")
                gbps[count] = _read_rate(fd, count, records, record_bytes, seconds)
        finally:
            os.close(fd)
    return DiskRates(
        direct=direct,
        record_bytes=record_bytes,
        file_bytes=records * record_bytes,
        source=source,
        gbps=gbps,
    )


def is_store(folder: Path, record_bytes: int, threads: tuple[int, ...]) -> bool:
    """Whether a folder has records of an expert store, enough for reads of that size."""
    path = folder / RECORDS_NAME
    return path.is_file() and path.stat().st_size >= record_bytes * max(threads)


@contextlib.contextmanager
def _probe_file(folder: Path, size_bytes: int, on_step: Callable[[str], None]) -> Iterator[Path]:
    """A file of incompressible bytes on disk, its pages dropped from the cache."""
    on_step(f"writing {size_bytes >> 20} MiB")
    handle, name = tempfile.mkstemp(prefix=".specmoe-doctor-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            generator = random.Random(0)
            left = size_bytes
            while left > 0:
                file.write(generator.randbytes(min(left, _WRITE_BYTES)))
                left -= _WRITE_BYTES
            file.flush()
            os.fsync(file.fileno())
            drop_cached_pages(file.fileno(), 0, 0)
        yield path
    finally:
        path.unlink()


def _open(path: Path) -> tuple[int, bool]:
    """Open for O_DIRECT reads where they work; returns the descriptor and whether they do."""
    if hasattr(os, "O_DIRECT"):
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            pread_into(fd, aligned_empty(4096).numpy().data, 0)
            return fd, True
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
    fd = os.open(path, os.O_RDONLY)
    avoid_page_cache(fd)
    return fd, False


def _read_rate(fd: int, threads: int, records: int, record_bytes: int, seconds: float) -> float:
    """1e9 bytes per second that `threads` readers get together, each with one read in flight.

    Reads land in one large region, as the runtime's do in its slots: it has huge pages, and a read
    into small ones is cut into more requests, which can halve the rate.
    """
    region = aligned_empty(threads * _PLACES * record_bytes)
    region.fill_(1)
    places = region.view(threads, _PLACES, record_bytes).numpy()
    deadline = [math.inf]
    counting = threading.Event()
    done_bytes = [0] * threads
    errors: list[OSError] = []

    def read(index: int) -> None:
        generator = random.Random(index)
        turns = itertools.cycle([places[index, place].data for place in range(_PLACES)])
        try:
            # Once at least, on a machine so busy that a thread has no turn before the deadline.
            while time.perf_counter() < deadline[0] or not done_bytes[index]:
                offset = generator.randrange(records) * record_bytes
                count = pread_into(fd, next(turns), offset)
                if counting.is_set():
                    done_bytes[index] += count
        except OSError as error:
            errors.append(error)

    workers = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    time.sleep(_WARM_UP_S)
    started_s = time.perf_counter()
    deadline[0] = started_s + seconds
    counting.set()
    for worker in workers:
        worker.join()
    elapsed_s = time.perf_counter() - started_s
    if errors:
        raise errors[0]
    return sum(done_bytes) / elapsed_s / 1e9


def memory_read_gbps(size_bytes: int, *, runs: int = 5) -> float:
    """1e9 bytes per second of a sum over memory, best of `runs`, with PyTorch's threads."""
    import torch

    data = torch.ones(size_bytes // 4, dtype=torch.float32)
    return size_bytes / 1e9 / _best_s(lambda: data.sum(), runs)


def gemv_gbps(size_bytes: int, dtype_name: str, *, hidden: int = 2048, runs: int = 5) -> float:
    """1e9 weight bytes per second of matrix times vector, which is what decoding does.

    Args:
        size_bytes: of the matrix, larger than the processor's caches.
        dtype_name: "bfloat16" or "float32".
        hidden: H, columns of the matrix.
        runs: the best of so many counts.
    """
    import torch

    dtype = getattr(torch, dtype_name)
    rows = size_bytes // dtype.itemsize // hidden
    matrix = torch.ones(rows, hidden, dtype=dtype)
    vector = torch.ones(1, hidden, dtype=dtype)
    return matrix.nbytes / 1e9 / _best_s(lambda: torch.nn.functional.linear(vector, matrix), runs)


def _best_s(work: Callable[[], object], runs: int) -> float:
    work()
    times: list[float] = []
    for _ in range(runs):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return min(times)
