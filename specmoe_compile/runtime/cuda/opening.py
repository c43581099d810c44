"""Opens the session of a model on a CUDA device: checks, page locks, streams."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from specmoe_compile.errors import StoreError, UnsupportedModelError
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cuda.engine import CudaEngine
from specmoe_compile.runtime.cuda.page_lock import PageLock
from specmoe_compile.runtime.cuda.streams import CudaStreams
from specmoe_compile.runtime.cuda.supply import StagedSupply, staging_bytes
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.progress import phase
from specmoe_compile.system.sizes import format_bytes


def open_device_session(
    model: nn.Module,
    layers: Sequence[ExpertsLayer],
    store: ExpertStore,
    *,
    expert_cache_bytes: int,
    cache_policy: Policy,
    top_k: int,
    reader_threads: int,
) -> Session:
    """Page-lock a store in RAM, or a ring of buffers before one on disk, and open its session.

    Raises:
        StoreError: the memory cannot be page-locked, or the GPU has too little for the cache.
        UnsupportedModelError: the model spans several devices, or the kernels lack its experts.
        ValueError: the cache does not hold one token's experts.
    """
    device = _device_of(model)
    slot_bytes = sum(layout.record_bytes for layout in store.layouts)
    smallest = min(top_k, max(store.num_experts)) * slot_bytes
    streams = CudaStreams(device)
    held = contextlib.ExitStack()
    try:
        supply: StagedSupply | None = None
        if isinstance(store, RamStore):
            with phase(f"page-locking {format_bytes(store.total_bytes)}"):
                held.callback(PageLock(store.region).release)
        else:
            ring = aligned_empty(staging_bytes(store, reader_threads))
            held.callback(PageLock(ring).release)
            supply = StagedSupply(store, ring, streams, reader_threads=reader_threads)
            held.callback(supply.close)  # comes before the ring is unlocked
        return open_session(
            layers,
            store,
            supply=supply,
            device=device,
            expert_cache_bytes=max(expert_cache_bytes, smallest),
            cache_policy=cache_policy,
            top_k=top_k,
            streams=streams,
            release=held.close,
        )
    except torch.OutOfMemoryError as error:
        held.close()
        raise _too_little(device, max(expert_cache_bytes, smallest), smallest) from error
    except BaseException:
        held.close()
        raise


def open_session(
    layers: Sequence[ExpertsLayer], store: ExpertStore, *, top_k: int, **given: Any
) -> Session:
    """Open a session of a `CudaEngine`, which takes the arguments; the store is closed with it."""
    engine = CudaEngine(layers, store, top_k=top_k, **given)
    return Session(engine, layers=layers, store=store, top_k=top_k)


def _too_little(device: torch.device, cache_bytes: int, smallest_bytes: int) -> StoreError:
    """Say what the expert cache needs, what there is, and how small it may be."""
    free, total = torch.cuda.mem_get_info(device)
    return StoreError(
        f"The expert cache of {format_bytes(cache_bytes)} does not fit: {format_bytes(free)} of the"
        f" {format_bytes(total)} of {device} are free, and keys and values need some of it too."
        f" Give a smaller expert_cache (at least {format_bytes(smallest_bytes)}), or free GPU"
        " memory."
    )


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"The model spans {', '.join(sorted(map(str, devices)))}; offloaded experts need all"
            " else on one device: load it without a device_map."
        )
    return devices.pop()
