"""What tests on a real GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

RUNS = 20
"""Launches that have to give the same bits."""


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Fail where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
