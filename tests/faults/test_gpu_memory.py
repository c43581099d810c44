"""A GPU that is too small for the expert cache; host memory that cannot be page-locked."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import specmoe_compile
from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.cuda import opening
from tests.helpers import save_tiny
from tests.runtime.store_helpers import RandomSource


def test_too_little_gpu_memory_is_one_sentence_with_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simulated: the allocation of the slots fails as PyTorch's allocator does."""
    released: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

    source = RandomSource()
    store = opening.RamStore.from_source(source, progress=False)
    lock = SimpleNamespace(release=lambda: released.append("unlocked"))
    monkeypatch.setattr(opening, "CudaStreams", lambda device: None)
    monkeypatch.setattr(opening, "PageLock", lambda region: lock)
    monkeypatch.setattr(opening, "open_session", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 24 << 30))
    with pytest.raises(StoreError) as caught:
        opening.open_device_session(
            nn.Linear(2, 2),
            [],
            store,
            expert_cache_bytes=8 << 30,
            cache_policy="lru",
            top_k=source.top_k,
            reader_threads=1,
        )
    text = str(caught.value)
    assert "cache of 8.0 GiB does not fit: 3.0 GiB of the 24.0 GiB" in text
    assert "smaller expert_cache (at least " in text and "KiB)" in text
    assert released == ["unlocked"]


@pytest.mark.gpu
def test_a_cache_larger_than_the_gpu_is_one_sentence(tmp_path: Path) -> None:
    """Another tensor holds what the cache would need."""
    folder = save_tiny(tmp_path / "model", moe_intermediate_size=2048)
    gc.collect()
    torch.cuda.empty_cache()  # what other tests left to PyTorch would hold the cache
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises((StoreError, torch.OutOfMemoryError)) as caught:
            specmoe_compile.from_pretrained(
                folder, device="cuda", store="ram", expert_cache="100%", progress=False
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory" in str(caught.value)
    model = specmoe_compile.from_pretrained(
        folder, device="cuda", store="ram", expert_cache="100%", progress=False
    )
    specmoe_compile.close(model)
    assert free - torch.cuda.mem_get_info()[0] < 1 << 30
