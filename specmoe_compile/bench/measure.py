"""Measuring arms from beginning to end: the memory cap, the store, the turns, the document."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from specmoe_compile.bench import harness
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.memory_cap import why_not_permitted
from specmoe_compile.bench.progress import BenchProgress
from specmoe_compile.bench.records import SCHEMA, ArmJob
from specmoe_compile.system.launched import launched
from specmoe_compile.system.machine import cache_folder


def measure(
    model: str,
    names: Sequence[str],
    prompts: list[list[int]],
    settings: Mapping[str, Any],
    *,
    store_dir: Path | None,
    memory_cap_bytes: int | None,
    repeats: int,
    save_logits: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run arms and return the document of schema 1, without `model`.

    Args:
        model: checkpoint folder or hub name.
        names: arms, valid ones.
        prompts: token ids.
        settings: fields of `ArmJob` that all arms share.
        store_dir: folder of the store on disk, or None for the default one.
        memory_cap_bytes: limit wanted; a notice says so where it cannot be kept.
        repeats: times that each arm runs.
        save_logits: file for the logits, by arm.
    """
    memory_cap_bytes = permitted_cap(memory_cap_bytes)
    folder = None if store_dir is None else str(store_dir.expanduser())
    with tempfile.TemporaryDirectory(prefix="specmoe-bench-", dir=_work_parent(folder)) as work:
        jobs = [
            ArmJob(
                arm=name,
                model=model,
                prompts=prompts,
                store_dir=folder,
                work_dir=work,
                save_logits=(save_logits or {}).get(name),
                **settings,
            )
            for name in names
        ]
        packed = None
        if any(reads_store(name) for name in names):
            packed = _pack(jobs[0], memory_cap_bytes)
        jobs = [harness.with_peer_file(job) for job in jobs]
        result = run_jobs(jobs, repeats=repeats, memory_cap_bytes=memory_cap_bytes)
    result["settings"] = {**settings, "repeats": repeats, "order": "interleaved", "seed": 0}
    result["settings"]["ranks"] = launched().size
    result["pack"] = packed
    return result


def reads_store(arm: str) -> bool:
    """Whether an arm may run from a store on disk: all of specmoe's but `resident`."""
    return ARMS[arm].policy is not None and ARMS[arm].capped


def _pack(job: ArmJob, memory_cap_bytes: int | None) -> dict[str, Any]:
    """Pack the store under the cap, so that no arm's loading includes it; returns the report."""
    status = Console(stderr=True).status("Packing the expert store ...")
    with status, harness.cap_or_nothing(memory_cap_bytes) as cap:
        report = harness.run_pack(
            job.model,
            job.store_dir,
            job.dtype,
            quantize=job.quantize,
            cap=cap,
            work_dir=job.work_dir,
        )
    # Where the folder lies is nobody's business but this machine's.
    del report["path"]
    return report


def run_jobs(
    jobs: Sequence[ArmJob], *, repeats: int, memory_cap_bytes: int | None
) -> dict[str, Any]:
    """Run jobs with a progress bar; returns the document of schema 1 without `model`.

    `memory_cap_bytes` must be one that `permitted_cap` returned.
    """
    with BenchProgress(jobs, repeats) as progress:
        results = harness.run_arms(
            jobs, repeats=repeats, memory_cap_bytes=memory_cap_bytes, on_event=progress.on_event
        )
    return {
        "schema": SCHEMA,
        **provenance(),
        "arms": harness.arm_records(results),
        "failed": {name: r.error for name, r in results.items() if r.error is not None},
        "page_cache": (
            "specmoe reads its store with O_DIRECT, past the page cache; accelerate reads through"
            " it, warm from loading, as far as the memory cap leaves room; the pages of the"
            " checkpoint and of the files of mmap and llama_cpp are dropped before every run"
        ),
    }


def permitted_cap(memory_cap_bytes: int | None) -> int | None:
    """Return the cap if it can be kept here; otherwise say why not and return None."""
    if memory_cap_bytes is None:
        return None
    reason = why_not_permitted()
    if reason is None:
        return memory_cap_bytes
    print(f"specmoe: without the memory cap, because {reason}.", file=sys.stderr)
    return None


def _work_parent(store_dir: str | None) -> str | None:
    """Where temporary files go: beside the store, so that all arms use the same disk."""
    parent = cache_folder() if store_dir is None else Path(store_dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    return str(parent)
