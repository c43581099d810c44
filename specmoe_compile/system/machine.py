"""What the machine has: free RAM, and where caches belong."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUP_FILES = (
    # limit, usage: version 2, then version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_ram_bytes() -> int:
    """Return the RAM that can be used without swapping: the system's, or less under a cgroup."""
    available = int(psutil.virtual_memory().available)
    for limit_path, usage_path in _CGROUP_FILES:
        limit = _number_or_none(limit_path)
        usage = _number_or_none(usage_path)
        if limit is not None and usage is not None:
            available = min(available, max(limit - usage, 0))
    return available


def _number_or_none(path: str) -> int | None:
    """Return the number in a file; None if there is no such file or it says "max"."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


@contextlib.contextmanager
def one_compute_thread() -> Iterator[None]:
    """Run torch on one CPU thread; the setting is the process's, and is put back.

    Moving an expert is a handful of copies of a few megabytes. One thread does them at memory
    speed, while several wait for each other after each copy: where the cores are not free, packing
    is five times slower with two threads than with one.
    """
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
