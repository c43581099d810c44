"""Page-locking host memory of an exact size, so that a GPU can read it, and undoing that.

The region is registered in one call: a copy must not reach over two registrations.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.machine import available_ram_bytes
from specmoe_compile.runtime.sizes import format_bytes

logger = logging.getLogger(__name__)


class PageLock:
    """Memory that CUDA has page-locked; `release` undoes it, once."""

    def __init__(
        self,
        region: Tensor,
        *,
        runtime: Any = None,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        """Page-lock host memory.

        Args:
            region: [bytes] uint8, page-aligned; must stay alive until `release`.
            runtime: `torch.cuda.cudart()`.
            synchronize: waits for the device.

        Raises:
            StoreError: CUDA refuses; says what is needed and what there is.
        """
        self._runtime = torch.cuda.cudart() if runtime is None else runtime  # type: ignore[no-untyped-call]
        self._synchronize = synchronize
        self._mutex = threading.Lock()
        self._address: int | None = region.data_ptr()
        error = self._runtime.cudaHostRegister(region.data_ptr(), region.numel(), 0)
        if int(error):
            self._address = None
            raise StoreError(_refusal(region.numel(), self._say(error)))

    def release(self) -> None:
        """Wait for the device, which may still read, and unlock; does nothing the second time."""
        with self._mutex:
            address, self._address = self._address, None
        if address is None:
            return
        try:
            self._synchronize()
        finally:
            error = self._runtime.cudaHostUnregister(address)
            if int(error):
                logger.warning("CUDA could not unlock the experts' memory: %s.", self._say(error))

    def _say(self, error: Any) -> str:
        return f"error {int(error)}, {self._runtime.cudaGetErrorString(error)}"


def _refusal(size_bytes: int, error: str) -> str:
    free, limit = available_ram_bytes(), lock_limit_bytes_or_none()
    allowed = "no limit" if limit is None else f"a limit of {format_bytes(limit)}"
    return (
        f"CUDA could not page-lock {format_bytes(size_bytes)} of host memory for the experts"
        f" ({error}); {format_bytes(free)} of RAM are free and the process has {allowed} on locked"
        " memory (ulimit -l): free RAM, raise the limit, or keep the experts on disk"
        " (store='disk')."
    )


def lock_limit_bytes_or_none() -> int | None:
    """Most bytes that the process may lock (RLIMIT_MEMLOCK); None for no limit."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit
