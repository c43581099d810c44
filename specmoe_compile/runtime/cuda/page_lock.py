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
from specmoe_compile.system.machine import available_ram_bytes
from specmoe_compile.system.sizes import format_bytes

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

        The process's limit on locked memory (RLIMIT_MEMLOCK, `ulimit -l`) is raised first as far as
        the process may, if it is below the region's size. One that stays below refuses nothing by
        itself: NVIDIA's driver for Linux does not count what it locks.

        Args:
            region: [bytes] uint8, page-aligned; must stay alive until `release`.
            runtime: `torch.cuda.cudart()`.
            synchronize: waits for the device.

        Raises:
            StoreError: CUDA refuses; says what is needed and what there is.
        """
        self._runtime = torch.cuda.cudart() if runtime is None else runtime
        self._synchronize = synchronize
        self._mutex = threading.Lock()
        self._address: int | None = region.data_ptr()
        limit_bytes = too_small_lock_limit_or_none(region.numel())
        error = self._runtime.cudaHostRegister(region.data_ptr(), region.numel(), 0)
        if int(error):
            self._address = None
            raise StoreError(_refusal(region.numel(), limit_bytes, self._say(error)))

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


def _refusal(size_bytes: int, limit_bytes: int | None, error: str) -> str:
    if limit_bytes is None:
        cause = f"{format_bytes(available_ram_bytes())} of RAM are free: free RAM"
    else:
        cause = (
            f"the process may lock {format_bytes(limit_bytes)} (ulimit -l), and"
            f" {format_bytes(available_ram_bytes())} of RAM are free: raise the limit, free RAM"
        )
    return (
        f"CUDA could not page-lock {format_bytes(size_bytes)} of host memory for the experts"
        f" ({error}); {cause}, or keep the experts on disk (store='disk')."
    )


def too_small_lock_limit_or_none(size_bytes: int) -> int | None:
    """Raise RLIMIT_MEMLOCK as far as the process may, if it is below a size.

    Returns:
        The limit in bytes if it is still below; else None.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return None

    def suffices(limit: int) -> bool:
        return limit == resource.RLIM_INFINITY or limit >= size_bytes

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if suffices(soft):
        return None
    if hard != soft:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return None if suffices(hard) else hard
