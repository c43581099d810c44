"""Page-aligned host memory of an exact size.

`mmap` gives whole pages, so that O_DIRECT can read into it and CUDA can register it as it is;
torch's own allocators align to 64 bytes and its pinned one rounds sizes up to powers of two.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

HUGE_PAGE_BYTES = 2 << 20


def aligned_empty(size_bytes: int) -> torch.Tensor:
    """Return zeroed memory as [size_bytes] uint8 on the CPU, at a page-aligned address.

    Pages are given by the kernel when they are first written, so that a reserved region costs no
    RAM yet. Regions of at least one huge page ask for huge pages: a GEMV over an expert touches a
    thousand small ones otherwise. The memory lives as long as the tensor or a view of it.
    """
    if size_bytes <= 0:
        raise ValueError(f"size_bytes={size_bytes} must be positive.")
    region = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: nothing is lost
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)
