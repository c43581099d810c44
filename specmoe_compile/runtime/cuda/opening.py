"""Opens the session of a model on a CUDA device: checks, page locks, streams."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from specmoe_compile.errors import StoreError, UnsupportedModelError
from specmoe_compile.runtime.cuda.session import DeviceSession
from specmoe_compile.runtime.expert_store import ExpertStore
from specmoe_compile.runtime.experts_module import ExpertsLayer
from specmoe_compile.runtime.ram_store import RamStore
from specmoe_compile.runtime.sizes import format_bytes


def open_device_session(
    model: nn.Module,
    layers: Sequence[ExpertsLayer],
    store: ExpertStore,
    *,
    expert_cache_bytes: int,
    cache_policy: Literal["lru", "lfu"],
    top_k: int,
) -> DeviceSession:
    """Page-lock a store and open the session that reads it from the model's device.

    Raises:
        StoreError: the experts are on disk, or cannot be page-locked.
        UnsupportedModelError: the model spans several devices, or the kernels lack its experts.
        ValueError: the cache does not hold one token's experts.
    """
    device = _device_of(model)
    if not isinstance(store, RamStore):
        raise StoreError(
            "Experts that are computed on a GPU must be in RAM, and this store is on disk: use"
            " store='ram', or device='cpu'."
        )
    slot_bytes = sum(layout.record_bytes for layout in store.layouts)
    smallest = min(top_k, max(store.num_experts)) * slot_bytes
    release = _page_lock(store.region)
    try:
        return DeviceSession(
            layers,
            store,
            device=device,
            expert_cache_bytes=max(expert_cache_bytes, smallest),
            cache_policy=cache_policy,
            top_k=top_k,
            release=release,
        )
    except BaseException:
        release()
        raise


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"The model spans {', '.join(sorted(map(str, devices)))}; offloaded experts need all"
            " else on one device: load it without a device_map."
        )
    return devices.pop()


def _page_lock(region: Tensor) -> functools.partial[None]:
    """Page-lock host memory and return what undoes it."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(region.data_ptr(), region.numel(), 0))
    if error:
        raise StoreError(
            f"CUDA could not page-lock {format_bytes(region.numel())} of host memory (error"
            f" {error}): free RAM, raise the limit on locked memory, or use device='cpu'."
        )
    return functools.partial(_page_unlock, region)


def _page_unlock(region: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(region.data_ptr())  # type: ignore[no-untyped-call]
