"""Made-up results of `benchmarks.cpu_disk.run`, for the tests of what is derived from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from benchmarks.cpu_disk.figures import SCHEMA
from benchmarks.cpu_disk.plan import (
    BASE_CAP_BYTES,
    Cell,
)
from specmoe_compile.bench.arms import ARMS

MODEL = {
    "name": "m",
    "dtype": "float32",
    "moe_layers": 2,
    "experts": [32, 32],
    "top_k": 4,
    "bytes_per_expert": 1 << 20,
    "expert_bytes": 64 << 20,
}


TOKENS = 10


def cell_of(
    arm: str,
    mean_ms: float,
    *,
    size: str | None = None,
    cap: bool = False,
    missed: int | None = None,
    stall_ms: float = 0.0,
    wasted: int = 0,
    useful: int = 0,
    label: str = "",
    link_gbps: float = 1.0,
    short: bool = False,
) -> dict[str, Any]:
    """A cell of two equal runs of ten tokens, `missed` bytes read on demand for each."""
    total = None
    if ARMS[arm].policy is not None:
        total = {
            "demand_bytes": TOKENS * (missed or 0),
            "speculative_bytes": TOKENS * (useful + wasted),
            "useful_speculative_bytes": TOKENS * useful,
            "stall_ms": TOKENS * stall_ms,
        }
    run = {
        "median_ms": mean_ms,
        "mean_ms": mean_ms,
        "link_gbps": link_gbps,
        "total": total,
        "disk_read_bytes": None if missed is None else TOKENS * missed,
    }
    cell = Cell(arm=arm, size=size, capped=cap, label=label)
    layers = [{"recalled": 0, "needed": 0}, {"recalled": 3, "needed": 4}]
    return {
        "name": cell.name,
        "arm": arm,
        "size": size,
        "label": label,
        "tpot_ms": {"p20": mean_ms - 0.5, "p50": mean_ms, "p80": mean_ms + 0.5},
        "first_tpot_ms": {"p20": 2 * mean_ms, "p50": 2 * mean_ms, "p80": 2 * mean_ms},
        "short": short,
        "new_tokens": 16 if short else 48,
        "kept_alive": cell.kept_alive,
        "ttft_ms": 50.0,
        "hit_rate": None if total is None else 0.5,
        "memory_cap_bytes": cell.cap_bytes(MODEL["expert_bytes"]),  # type: ignore[arg-type]
        "peak_rss_bytes": 1 << 29,
        "samples": 2 * TOKENS,
        "repeats": 2,
        "per_run": [run, copy.deepcopy(run)],
        "layers": None if total is None else layers,
        "tokens_sha256": "a",
        "first_tokens_sha256": "b",
    }


def phase_of(*cells: dict[str, Any], **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "commit": "c" * 40,
        "machine": {"cpu": "a CPU", "cores": 2, "ram_bytes": 1 << 30, "system": "S", "gpu": None},
        "versions": {"torch": "2.13"},
        "model": MODEL,
        "load_average": [0.5, 0.5, 0.5],
        "wall_s": 60.0,
        "cells": list(cells),
        "failed": {},
        "refused": {},
        "sentinel": {"cell": "cache 25%", "medians_ms": [10.0, 11.0, 10.0]},
        "idle_cores": 0.01,
        "settings": {
            "prompts": 2,
            "prompt_tokens": 64,
            "new_tokens": 48,
            "slow_tokens": 16,
            "passes": 2,
            "base_cap_bytes": BASE_CAP_BYTES,
            "dry": False,
        },
    }
    return {**result, **changes}


def write(folder: Path, **phases: dict[str, Any]) -> Path:
    for name, value in phases.items():
        (folder / f"cpu_disk_{name}.json").write_text(json.dumps(value))
    return folder
