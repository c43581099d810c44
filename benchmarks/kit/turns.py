"""Several processes on one machine that prepare beside each other and measure one at a time.

They name one file. Whoever prepares (draws weights, compiles) shares its lock, and whoever measures
has it alone, so that nothing is measured while another process keeps the machine busy.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(file: Path | None) -> Iterator[None]:
    """Wait until no other process that names the file prepares or measures; None: do not wait."""
    with _locked(file, fcntl.LOCK_EX):
        yield


@contextmanager
def preparing(file: Path | None) -> Iterator[None]:
    """Wait until no other process measures; None: do not wait. Never within a `turn`."""
    with _locked(file, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(file: Path | None, kind: int) -> Iterator[None]:
    if file is None:
        yield
        return
    with file.open("w") as held:  # closing gives the lock away
        fcntl.flock(held, kind)
        yield
