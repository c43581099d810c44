"""What the machine has: free RAM, and where caches belong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

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
