"""File calls that differ between Linux and macOS, under one name each."""

from __future__ import annotations

import contextlib
import fcntl
import os


def sync_data(fd: int) -> None:
    """Make what was written to a file survive a power cut.

    Linux needs not write the file's times for that (`fdatasync`, which macOS lacks); on macOS
    `fsync` leaves data in the drive's own cache, and only F_FULLFSYNC does not.
    """
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
        return
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # a file system without it: fsync is all there is
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read at `offset` into a buffer; returns how many bytes came, 0 at the end of the file.

    `preadv` releases the interpreter's lock while it reads; macOS before 11 lacks it.
    """
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def avoid_page_cache(fd: int) -> bool:
    """Ask macOS not to keep what is read or written; returns whether it agreed.

    Elsewhere O_DIRECT does that, when the file is opened.
    """
    if hasattr(fcntl, "F_NOCACHE"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
            return True
    return False


def drop_cached_pages(fd: int, offset: int, size_bytes: int) -> None:
    """Let the kernel forget pages that were read; where it cannot be told, they stay."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)
