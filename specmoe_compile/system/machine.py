"""What the machine has: free RAM, and where caches belong."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from specmoe_compile.system.memory_groups import room_bytes_or_none


def available_ram_bytes() -> int:
    """Return the RAM that can be used without swapping, and without being killed by a limit.

    The system's, or what the process's memory control groups still allow; pages of files that the
    kernel can take back count as free in both.
    """
    available = int(psutil.virtual_memory().available)
    room = room_bytes_or_none()
    return available if room is None else min(available, room)


def cpu_count() -> int:
    """Return how many logical processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def one_compute_thread() -> Iterator[None]:
    """Run torch on one CPU thread; the setting is the process's, and is put back.

    Moving an expert is a handful of copies of a few megabytes. One thread does them at memory
    speed, while several wait for each other after each copy: where the cores are not free, packing
    is five times slower with two threads than with one.
    """
    import torch  # here, because peers that are measured beside us load no torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cache_folder() -> Path:
    """Return the folder for what can be made again, by the platform's convention."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        # The convention says that a relative path is to be ignored.
        given = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(given) if os.path.isabs(given) else home / ".cache"
    return base / "specmoe"
