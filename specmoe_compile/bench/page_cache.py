"""Keeps an earlier process's page cache from deciding what a later one measures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from specmoe_compile.system import files


def drop_cached_pages(folder: Path) -> None:
    """Drop a checkpoint's files from the page cache.

    Pages that another process left there count against no cap but that process's, so that a capped
    arm could read a whole model from memory. A model from the hub is read as it is.
    """
    drop_pages(folder.glob("*.safetensors"))


def drop_pages(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, where the system can; pages that are mapped stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            # Pages that are not on disk yet would stay.
            os.fsync(fd)
            files.drop_cached_pages(fd, 0, 0)
        finally:
            os.close(fd)
