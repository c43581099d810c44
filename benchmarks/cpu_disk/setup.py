"""What the phases of `benchmarks.cpu_disk.run` share: model, store, peers' files, compiled code."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.cpu_disk.figures import SCHEMA
from benchmarks.cpu_disk.plan import SLOW_TOKENS, Cell
from benchmarks.end_to_end.run import held_out_prompts
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.child import ArmFailedError, ArmInputError
from specmoe_compile.bench.harness import cap_or_nothing, run_pack, with_peer_file
from specmoe_compile.bench.live_worker import LiveWorker
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.measure import permitted_cap
from specmoe_compile.bench.memory_cap import MemoryCap
from specmoe_compile.bench.probes import disk_rates
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.cli.bench import describe_model
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.system.output import write_json

DTYPE = "float32"
DRY_RECORD_MIB = 0.1875
READER_THREADS = 4
PROBE_S = 0.3
TIMEOUT_S = 600.0
"""For a worker's start-up, and for each of its turns."""
TOGETHER = 2
"""Workers that start at the same time: start-up is mostly one thread, and is not timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A worker, and the memory cap that it lives in."""

    worker: LiveWorker
    cap: MemoryCap | None


class Bench:
    """Where things are, and how much to run."""

    def __init__(self, arguments: argparse.Namespace, work_dir: str) -> None:
        self.dry: bool = arguments.dry
        self.folder: Path = arguments.folder
        self.results: Path = arguments.results
        self.passes: int = arguments.passes
        self.new_tokens: int = arguments.new_tokens
        self.work_dir = work_dir
        self.prompts = held_out_prompts(arguments.prompts)
        record_mib = DRY_RECORD_MIB if self.dry else arguments.record_mib
        self.model = widened_model(self.folder, record_mib, DTYPE)
        self.store_dir = self.folder / f"{self.model.name}-store"
        self.about = describe_model(str(self.model), DTYPE)
        self.provenance = provenance()  # before the results of this run change the tree
        self.started_s = self.phase_started_s = time.monotonic()
        self.program_bytes = arguments.program_mib << 20
        self.caps_permitted = permitted_cap(self.program_bytes) is not None
        self.packed = False
        self.peer_files: dict[str, str] = {}
        self.compiled: set[str] = set()

    def start(self, cell: Cell, stack: contextlib.ExitStack, **changes: Any) -> Started:
        """Start a worker for a cell, under its cap; `stack` ends them."""
        cap_bytes = cell.cap_bytes(self.about["expert_bytes"]) if self.caps_permitted else None
        cap = stack.enter_context(cap_or_nothing(cap_bytes))
        job = self.job(cell, **changes)
        worker = stack.enter_context(
            contextlib.closing(LiveWorker(job, cap=cap, timeout_s=TIMEOUT_S))
        )
        return Started(worker=worker, cap=cap)

    def job(self, cell: Cell, **changes: Any) -> ArmJob:
        """What a worker process is to measure."""
        slow = cell.slow
        options = cell.all_options
        if self.dry and ARMS[cell.arm].options is not None:
            options["lowering"] = "eager"
        values: dict[str, Any] = {
            "arm": cell.arm,
            "model": str(self.model),
            "prompts": self.prompts,
            "new_tokens": min(SLOW_TOKENS, self.new_tokens) if slow else self.new_tokens,
            "warmup_tokens": 3 if slow else 8,
            # Nothing is left out, so that times and bytes are of the same tokens.
            "skip_tokens": 0,
            "device": "cpu",
            "dtype": DTYPE,
            "expert_cache": cell.size or "25%",
            "store_dir": str(self.store_dir),
            "options": options,
            "peer_file": self.peer_files.get(cell.arm),
            "work_dir": self.work_dir,
        }
        return ArmJob(**{**values, **changes})

    def link_gbps(self) -> float:
        """What the disk gives now: the store's own records, read at random past the page cache."""
        rates = disk_rates(
            self.store_dir,
            record_bytes=self.about["bytes_per_expert"],
            threads=(READER_THREADS,),
            file_bytes=0,
            seconds=0.05 if self.dry else PROBE_S,
        )
        return rates.gbps[READER_THREADS]

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write one phase's result with what it was measured on."""
        self.results.mkdir(parents=True, exist_ok=True)
        about = {
            "schema": SCHEMA,
            **self.provenance,
            "model": self.about,
            "load_average": list(os.getloadavg()),
            "wall_s": round(time.monotonic() - self.phase_started_s, 1),
        }
        self.phase_started_s = time.monotonic()
        path = self.results / f"cpu_disk_{name}.json"
        write_json(path, {**about, **value})
        print(f"wrote {path.name} after {about['wall_s']:.0f} s", flush=True)


def groups(cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Split cells into those whose workers start at the same time."""
    rest = iter(cells)
    while group := list(islice(rest, TOGETHER)):
        yield group


def prepare(bench: Bench, cells: Sequence[Cell]) -> dict[Cell, str]:
    """Pack, write what the peers read, compile; none of it is timed, all of it is done once.

    Returns:
        What went wrong, by cell: those cannot run.
    """
    if not bench.packed:
        run_pack(str(bench.model), str(bench.store_dir), DTYPE, cap=None, work_dir=bench.work_dir)
        bench.packed = True
    failed: dict[Cell, str] = {}
    refused: dict[str, str] = {}
    for cell in cells:
        if cell.arm not in bench.peer_files and cell.arm not in refused:
            try:
                job = with_peer_file(bench.job(cell))
                if job.peer_file is not None:
                    bench.peer_files[cell.arm] = job.peer_file
            except (ArmInputError, ArmFailedError) as error:
                refused[cell.arm] = str(error)
        if cell.arm in refused:
            failed[cell] = refused[cell.arm]
            print(f"{cell.name}: {failed[cell]}", flush=True)
    for group in groups(_to_compile(bench, cells)):
        print(f"compiling for {' and '.join(cell.name for cell in group)}", flush=True)
        with contextlib.ExitStack() as stack:
            # A compiler does not fit under the caps.
            loose = [replace(cell, capped=False) for cell in group]
            for started in [bench.start(cell, stack, warmup_tokens=3) for cell in loose]:
                started.worker.wait_ready()
                started.worker.finish()
    return failed


def _to_compile(bench: Bench, cells: Iterable[Cell]) -> Iterator[Cell]:
    """One cell for each graph that was not compiled yet; sizes of the cache share one."""
    for cell in cells:
        arm = ARMS[cell.arm]
        if arm.options is None or bench.dry:
            continue
        key = repr(({**arm.options, **bench.job(cell).options}, cell.arm == "on_demand"))
        if key not in bench.compiled:
            bench.compiled.add(key)
            yield cell


def refusal(bench: Bench, size: str) -> str:
    """What specmoe says to a cache of this size.

    Raises:
        AssertionError: it takes it after all.
    """
    with contextlib.ExitStack() as stack:
        started = bench.start(Cell(arm="cache", size=size), stack)
        try:
            started.worker.wait_ready()
        except ArmInputError as error:
            return str(error)
    raise AssertionError(f"a cache of {size} was expected to be refused, and ran")
