"""Putting host memory on the NUMA node that a GPU hangs on: a remote node costs bandwidth."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, which the C library does not wrap."""
_PREFERRED = 1
_MASK_BITS = 64
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def node_of_pci_device_or_none(address: str, *, devices: Path = _PCI_DEVICES) -> int | None:
    """NUMA node of a PCI device such as "0000:3b:00.0"; None where the system does not know it."""
    try:
        node = int((devices / address / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def gpu_node_or_none(device: torch.device) -> int | None:
    """NUMA node of a device; None for a CPU and where it is not known."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        domain, bus, place = (
            getattr(properties, f"pci_{name}_id") for name in ("domain", "bus", "device")
        )
    except AttributeError:  # an older PyTorch
        return None
    return node_of_pci_device_or_none(f"{domain:04x}:{bus:02x}:{place:02x}.0")


def prefer_node(region: torch.Tensor, node: int) -> bool:
    """Ask for pages of a NUMA node, before the first of them is written.

    Where the node is full the pages come from another one.

    Args:
        region: [bytes] uint8 on the CPU, page-aligned.
        node: its number.

    Returns:
        Whether the system agreed; if not, it says so in the log.
    """
    number = _MBIND.get(platform.machine())
    if number is None or os.uname().sysname != "Linux" or not 0 <= node < _MASK_BITS:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    mask = ctypes.c_ulong(1 << node)
    # The kernel reads one bit less than the number that it is given.
    failed = libc.syscall(
        number,
        ctypes.c_void_p(region.data_ptr()),
        ctypes.c_ulong(region.numel()),
        _PREFERRED,
        ctypes.byref(mask),
        ctypes.c_ulong(_MASK_BITS + 1),
        0,
    )
    if failed:
        reason = os.strerror(ctypes.get_errno())
        logger.info("Experts could not be put on NUMA node %d: %s.", node, reason)
    return not failed
