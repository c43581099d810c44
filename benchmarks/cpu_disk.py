"""The published comparison on a CPU with experts on disk: against the peers, and the limit.

    make bench                                          everything, in about 35 minutes on two cores
    python -m benchmarks.cpu_disk --only tight          one phase
    python -m benchmarks.cpu_disk --only report         the document from the result files

Phases, each with its own result in `benchmarks/results/cpu_disk_*.json`:

- tight     caches that are refused, and the smallest one; memory capped
- roomy     caches of 25, 50 and 100 %; memory capped
- uncapped  the same without a cap, the arms that need all memory, the approximate policies
- loss      what the approximate policies cost in loss, and save in bytes
- report    writes docs/results/cpu-disk.md and its plots

Within a phase every cell runs there and back (A B C C B A), each time in a process of its own, and
one cell more often, at the start, in the middle and at the end: it shows the machine's drift. The
disk is read for a moment around each run, for the limit. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import explains_errors
from benchmarks.cpu_disk_plan import (
    BASE_CAP_BYTES,
    SLOW_ARMS,
    SLOW_TOKENS,
    Cell,
    dry_cells,
    order_of,
    phase_cells,
    sentinel,
    sizes_of,
)
from benchmarks.cpu_disk_report import write_report
from benchmarks.end_to_end import PROMPT_TOKENS, RECORD_MIB, RESULTS, held_out_prompts
from benchmarks.reference_model.data import HELD_OUT_FILES, default_source
from specmoe_compile.cli.bench import describe_model, permitted_cap
from specmoe_compile.cli.demo import repository_root, widened_model
from specmoe_compile.cli.measure.arms import ARMS
from specmoe_compile.cli.measure.harness import (
    ArmFailedError,
    ArmInputError,
    cap_or_nothing,
    run_pack,
    run_python,
    run_worker,
    with_peer_file,
)
from specmoe_compile.cli.measure.machine import commit_or_none, describe_machine, versions
from specmoe_compile.cli.measure.probes import file_gbps
from specmoe_compile.cli.measure.records import ArmJob, ArmRun, arm_record, quantile, tokens_sha256
from specmoe_compile.cli.output import quiet_transformers, write_json
from specmoe_compile.runtime.machine import cache_folder

REPORT = repository_root() / "docs" / "results" / "cpu-disk.md"
TIMED = ("tight", "roomy", "uncapped")
PHASES = (*TIMED, "loss", "report")
DTYPE = "float32"
DRY_RECORD_MIB = 0.1875
READER_THREADS = 4
PROBE_S = 0.3
LOSS_POLICIES = (
    "exact",
    "default_vector=0.1",
    "default_vector=0.2",
    "default_vector=0.3",
    "commit",
)


@dataclass(slots=True)
class Timed:
    """Runs of one cell, with the disk's bandwidth before and after each."""

    runs: list[ArmRun] = field(default_factory=list)
    link_gbps: list[float] = field(default_factory=list)
    cap_bytes: int | None = None
    peaks_bytes: list[int | None] = field(default_factory=list)
    error: str | None = None


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
        record_mib = DRY_RECORD_MIB if self.dry else RECORD_MIB
        self.model = widened_model(repository_root(), self.folder, record_mib, DTYPE)
        self.store_dir = self.folder / f"{self.model.name}-store"
        self.about = describe_model(str(self.model), DTYPE)
        self.started_s = self.phase_started_s = time.monotonic()
        self.caps_permitted = permitted_cap(BASE_CAP_BYTES) is not None

    def job(self, cell: Cell, **changes: Any) -> ArmJob:
        """What a worker process is to measure."""
        slow = cell.arm in SLOW_ARMS
        options = dict(cell.options)
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
            "work_dir": self.work_dir,
        }
        return ArmJob(**{**values, **changes})

    def link_gbps(self) -> float:
        """What the disk gives now: the store's own records, read at random past the page cache."""
        return file_gbps(
            self.store_dir / "experts.bin",
            record_bytes=self.about["bytes_per_expert"],
            threads=READER_THREADS,
            seconds=0.05 if self.dry else PROBE_S,
        )

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write one phase's result with what it was measured on."""
        self.results.mkdir(parents=True, exist_ok=True)
        about = {
            "schema": 1,
            "commit": commit_or_none(),
            "machine": describe_machine(),
            "versions": versions(),
            "model": self.about,
            "load_average": list(os.getloadavg()),
            "wall_s": round(time.monotonic() - self.phase_started_s, 1),
        }
        self.phase_started_s = time.monotonic()
        path = self.results / f"cpu_disk_{name}.json"
        write_json(path, {**about, **value})
        print(f"wrote {path.name} after {about['wall_s']:.0f} s", flush=True)


def run_timed(bench: Bench, phase: str) -> None:
    """Time every cell of a phase, there and back, the sentinel around them."""
    cells = dry_cells(phase) if bench.dry else phase_cells(phase, bench.about)
    watch = sentinel(phase)
    refused = sizes_of(bench.about)[0] if phase == "tight" else []
    found = {cell: Timed() for cell in (*cells, watch)}
    files = _prepare(bench, [*cells, watch], found)
    refusals = {size: _refusal(bench, size) for size in refused}
    marks = [_run_cell(bench, watch, found[watch], None)]
    for turn, order in enumerate(order_of(cells, bench.passes)):
        for index in order:
            cell = cells[index]
            # The sentinel's own cell has had its turns.
            if found[cell].error is None and cell != watch:
                _run_cell(bench, cell, found[cell], files.get(cell.arm))
        last = turn == bench.passes - 1
        if last or turn == (bench.passes - 1) // 2:
            marks.append(_run_cell(bench, watch, found[watch], None))
    bench.write(
        phase,
        {
            "cells": [_record(cell, timed) for cell, timed in found.items() if timed.runs],
            "failed": {cell.name: t.error for cell, t in found.items() if t.error is not None},
            "refused": refusals,
            "sentinel": {"cell": watch.name, "medians_ms": marks},
            "settings": {
                "prompts": len(bench.prompts),
                "prompt_tokens": PROMPT_TOKENS,
                "new_tokens": bench.new_tokens,
                "slow_tokens": SLOW_TOKENS,
                "passes": bench.passes,
                "base_cap_bytes": BASE_CAP_BYTES,
                "reader_threads": READER_THREADS,
                "seed": 0,
                "dry": bench.dry,
            },
        },
    )


def _prepare(bench: Bench, cells: Sequence[Cell], found: dict[Cell, Timed]) -> dict[str, str]:
    """Pack, write what the peers read, compile; none of it is timed. Returns the peers' files."""
    run_pack(str(bench.model), str(bench.store_dir), DTYPE, cap=None, work_dir=bench.work_dir)
    files: dict[str, str] = {}
    compiled: set[str] = set()
    for cell in cells:
        job = bench.job(cell)
        if cell.arm not in files:
            try:
                job = with_peer_file(job)
            except (ArmInputError, ArmFailedError) as error:
                found[cell].error = str(error)
                print(f"{cell.name}: {error}", flush=True)
                continue
            if job.peer_file is not None:
                files[cell.arm] = job.peer_file
        arm = ARMS[cell.arm]
        if arm.options is None or bench.dry:
            continue
        # Graphs are the same for every cache size; a compiler does not fit under the caps.
        key = repr(({**arm.options, **job.options}, cell.arm == "on_demand"))
        if key not in compiled:
            compiled.add(key)
            print(f"compiling for {cell.name}", flush=True)
            run_worker(bench.job(cell, new_tokens=4, warmup_tokens=3))
    return files


def _refusal(bench: Bench, size: str) -> str:
    """What specmoe says to a cache of this size.

    Raises:
        AssertionError: it takes it after all.
    """
    try:
        run_worker(bench.job(Cell(arm="cache", size=size), new_tokens=4, warmup_tokens=3))
    except ArmInputError as error:
        return str(error)
    raise AssertionError(f"a cache of {size} was expected to be refused, and ran")


def _run_cell(bench: Bench, cell: Cell, timed: Timed, peer_file: str | None) -> float | None:
    """Run a cell once; returns its median in ms, None if it failed."""
    before = bench.link_gbps()
    if bench.caps_permitted:
        timed.cap_bytes = cell.cap_bytes(bench.about["expert_bytes"])
    try:
        with cap_or_nothing(timed.cap_bytes) as cap:
            run = run_worker(bench.job(cell, peer_file=peer_file), cap=cap)
            timed.peaks_bytes.append(None if cap is None else cap.peak_bytes_or_none())
    except (ArmFailedError, ArmInputError) as error:
        timed.error = str(error)
        print(f"{cell.name}: {error}", flush=True)
        return None
    timed.runs.append(run)
    timed.link_gbps.append(round((before + bench.link_gbps()) / 2, 4))
    median = quantile(run.tpot_samples_ms, 0.5)
    print(
        f"{time.monotonic() - bench.started_s:5.0f} s  {cell.name}: {median:.2f} ms"
        f" ({timed.link_gbps[-1]:.2f} GB/s)",
        flush=True,
    )
    return round(median, 4)


def _record(cell: Cell, timed: Timed) -> dict[str, Any]:
    """One cell's record, without single samples."""
    record = arm_record(
        cell.name,
        timed.runs,
        memory_cap_bytes=timed.cap_bytes,
        cgroup_peaks_bytes=timed.peaks_bytes,
    )
    del record["tokens"], record["runs"]
    first = timed.runs[0]
    record |= {
        "arm": cell.arm,
        "size": cell.size,
        "label": cell.label,
        "prompts": len(first.tokens),
        "first_tokens_sha256": tokens_sha256([row[:SLOW_TOKENS] for row in first.tokens]),
        "per_run": [
            {
                "median_ms": round(quantile(run.tpot_samples_ms, 0.5), 4),
                "mean_ms": round(sum(run.tpot_samples_ms) / len(run.tpot_samples_ms), 4),
                "link_gbps": link,
                "total": None if run.decode is None else run.decode["total"],
                "disk_read_bytes": run.decode_read_bytes,
            }
            for run, link in zip(timed.runs, timed.link_gbps, strict=True)
        ],
        "layers": None if first.decode is None else first.decode["layers"],
    }
    return record


def run_loss(bench: Bench) -> None:
    """Loss and bytes per token of the approximate policies, over held-out text."""
    text = Path(bench.work_dir) / "held_out.txt"
    source = default_source()
    text.write_text("\n".join((source / name).read_text("utf-8") for name in HELD_OUT_FILES))
    out = Path(bench.work_dir) / "loss.json"
    sizes = ("64", "32", "8") if bench.dry else ("1024", "256", "64")
    arguments = ["eval", str(bench.model), "--text", str(text), "--dtype", DTYPE]
    arguments += ["--store-dir", str(bench.store_dir), "--expert-cache", "25%"]
    arguments += ["--tokens", sizes[0], "--window", sizes[1], "--context", sizes[2]]
    arguments += ["--prompts", "1", "--new-tokens", "8", "--json", str(out)]
    if bench.dry:
        arguments += ["-O", "lowering=eager"]
    for policy in LOSS_POLICIES[:2] if bench.dry else LOSS_POLICIES:
        arguments += ["--policy", policy]
    run_python(["-m", "specmoe_compile.cli.main", *arguments])
    found = json.loads(out.read_text("utf-8"))
    found["model_folder"] = Path(found.pop("model")).name
    bench.write("loss", found)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_disk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--passes", type=int, default=2, help="there, back, there, ...")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--dry", action="store_true", help="a small model, few cells: a test")
    parser.add_argument(
        "--folder", type=Path, default=cache_folder() / "demo", help="for model and store"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--report", type=Path, default=REPORT, help="the document to write")
    return parser.parse_args(argv)


@explains_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases asked for; returns 0, or 2 for a mistake."""
    arguments = parse_arguments(argv)
    quiet_transformers()
    if set(arguments.only) != {"report"}:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as work_dir:
            bench = Bench(arguments, work_dir)
            for phase in PHASES[:-1]:
                if phase in arguments.only:
                    print(f"== {phase}", flush=True)
                    run_loss(bench) if phase == "loss" else run_timed(bench, phase)
    if "report" in arguments.only:
        write_report(arguments.results, arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
