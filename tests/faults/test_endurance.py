"""A thousand generations in one process: no growth of memory, threads or descriptors."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import specmoe_compile
from tests.helpers import prompts, save_tiny

pytestmark = pytest.mark.slow

GENERATIONS = 1000
SETTLED = 200
MAX_GROWTH_BYTES = 8 << 20  # allocators round; a leak of one record per generation would be 24 MB


def test_a_thousand_generations_leave_nothing_behind(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", layers=2)
    model: Any = specmoe_compile.from_pretrained(
        folder, device="cpu", store="disk", store_dir=tmp_path / "store", progress=False
    )
    process = psutil.Process()
    expected: dict[int, torch.Tensor] = {}
    settled: tuple[int, int, int] | None = None
    for generation in range(GENERATIONS):
        seed = generation % 4
        ids = prompts(1, 3 + seed, seed=seed)
        out = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(out, expected.setdefault(seed, out)), generation
        if generation in (SETTLED, GENERATIONS - 1):
            gc.collect()
            now = (
                process.memory_info().rss,
                threading.active_count(),
                len(os.listdir("/proc/self/fd")),
            )
            settled = settled or now
    assert settled is not None
    print(f"from {settled} to {now}: bytes resident, threads, descriptors")
    assert now[0] - settled[0] < MAX_GROWTH_BYTES
    assert now[1:] == settled[1:]


def test_loading_and_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", layers=2)
    counts = []
    for _ in range(12):
        model: Any = specmoe_compile.from_pretrained(
            folder, device="cpu", store="disk", store_dir=tmp_path / "store", progress=False
        )
        model.generate(prompts(1, 4), max_new_tokens=2, do_sample=False)
        specmoe_compile.close(model)
        del model
        gc.collect()
        counts.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
    assert counts[-1] == counts[2], counts
