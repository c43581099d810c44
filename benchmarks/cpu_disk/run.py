"""The published comparison on a CPU with experts on disk: against the peers, and the limit.

    make bench                                          everything, in under 20 minutes on two cores
    python -m benchmarks cpu_disk --only tight          one phase
    python -m benchmarks cpu_disk --only report         the document from the result files

Phases, each with its own result in `benchmarks/results/cpu_disk_*.json`:

- tight     caches that are refused, and the smallest one; memory capped
- roomy     caches of 25, 50 and 100 %; memory capped
- uncapped  the same without a cap, the arms that need all memory, the approximate policies
- loss      what the approximate policies cost in loss, and save in bytes
- report    writes docs/results/log/cpu-disk.md and its plots
- engine    only by --only: what the C++ engine is judged by, against the peers and the limit;
            with --sizes 25% two minutes, and a result of its own
- large     only by --only: the capped cells of that; with --record-mib 24, 6.4 GB of experts

Within a phase every cell runs there and back (A B C C B A), one at a time, and one cell more often,
at the start, in the middle and at the end: it shows the machine's drift. The disk is read for a
moment around each run, for the limit. Arms that do not live on the page cache wait in a process
that stays alive, started two at a time before anything is timed, as many as fit the free memory;
each turn repeats the warm-up. All others have a process for each turn. Run it on a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.cpu_disk.plan import (
    ALONE,
    BASE_CAP_BYTES,
    SLOW_TOKENS,
    chosen_cells,
    dry_cells,
    order_of,
    phase_cells,
    sentinel,
    sizes_of,
)
from benchmarks.cpu_disk.report import write_report
from benchmarks.cpu_disk.setup import DTYPE, READER_THREADS, Bench, prepare, refusal
from benchmarks.cpu_disk.turns import Timed, Turns, cell_record
from benchmarks.end_to_end.run import PROMPT_TOKENS, RECORD_MIB
from benchmarks.kit.command import run_parser
from benchmarks.kit.places import LOG, RESULTS
from benchmarks.reference_model.data import HELD_OUT_FILES, default_source
from specmoe_compile.bench.child import run_python
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import quiet_transformers

REPORT = LOG / "cpu-disk.md"
TIMED = ("tight", "roomy", "uncapped")
PHASES = (*TIMED, "loss", "report")
LOSS_POLICIES = (
    "exact",
    "default_vector=0.1",
    "default_vector=0.2",
    "default_vector=0.3",
    "commit",
)


def run_timed(bench: Bench, phase: str, sizes: Sequence[str] | None) -> None:
    """Time the cells of a phase, there and back, the sentinel around them."""
    planned = dry_cells(phase) if bench.dry else phase_cells(phase, bench.about)
    given = {"program_bytes": bench.program_bytes}
    cells = [replace(cell, **given) for cell in chosen_cells(planned, sizes)]
    watch = replace(sentinel(phase, cells), **given)
    refused = sizes_of(bench.about)[0] if phase == "tight" else []
    found = {cell: Timed() for cell in (*cells, watch)}
    for cell, why in prepare(bench, [watch, *cells]).items():
        found[cell].error = why
    refusals = {size: refusal(bench, size) for size in refused}
    with contextlib.closing(Turns(bench, found)) as turns:
        turns.start([watch, *cells])
        marks = [turns.run(watch)]
        for turn, order in enumerate(order_of(cells, bench.passes)):
            for index in order:
                # The sentinel's own cell has turns of its own.
                if cells[index] != watch:
                    turns.run(cells[index])
            if turn in ((bench.passes - 1) // 2, bench.passes - 1):
                marks.append(turns.run(watch))
        turns.finish()
    bench.write(
        phase if sizes is None else "_".join([phase, *(s.removesuffix("%") for s in sizes)]),
        {
            "cells": [
                cell_record(cell, timed, bench.new_tokens)
                for cell, timed in found.items()
                if timed.runs
            ],
            "failed": {cell.name: t.error for cell, t in found.items() if t.error is not None},
            "refused": refusals,
            "sentinel": {"cell": watch.name, "medians_ms": marks},
            "idle_cores": round(turns.idle_cores, 4),
            "settings": {
                "prompts": len(bench.prompts),
                "prompt_tokens": PROMPT_TOKENS,
                "new_tokens": bench.new_tokens,
                "slow_tokens": SLOW_TOKENS,
                "passes": bench.passes,
                "base_cap_bytes": bench.program_bytes,
                "reader_threads": READER_THREADS,
                "seed": 0,
                "dry": bench.dry,
            },
        },
    )


def run_loss(bench: Bench) -> None:
    """Loss and bytes per token of the approximate policies, over held-out text."""
    text = Path(bench.work_dir) / "held_out.txt"
    source = default_source()
    text.write_text("\n".join((source / name).read_text("utf-8") for name in HELD_OUT_FILES))
    out = Path(bench.work_dir) / "loss.json"
    sizes = ("64", "32", "8") if bench.dry else ("512", "256", "64")
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
    # The evaluation's own schema: the phase's result has one.
    found["eval_schema"] = found.pop("schema")
    found["model_folder"] = Path(found.pop("model")).name
    bench.write("loss", found)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = run_parser("cpu_disk", __doc__)
    parser.add_argument("--only", nargs="+", choices=(*PHASES, *ALONE), default=list(PHASES))
    parser.add_argument("--sizes", nargs="+", help="only these caches' cells, or none for the rest")
    parser.add_argument("--passes", type=int, default=2, help="there, back, there, ...")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--dry", action="store_true", help="a small model, few cells: a test")
    parser.add_argument("--record-mib", type=float, default=RECORD_MIB, help="of one expert")
    parser.add_argument(
        "--program-mib", type=int, default=BASE_CAP_BYTES >> 20, help="of a cap, besides the cache"
    )
    parser.add_argument(
        "--folder", type=Path, default=cache_folder() / "demo", help="for model and store"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--report", type=Path, default=REPORT, help="the document to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases asked for; returns 0, or 2 for a mistake."""
    arguments = parse_arguments(argv)
    quiet_transformers()
    started_s = time.monotonic()
    if set(arguments.only) != {"report"}:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as work_dir:
            bench = Bench(arguments, work_dir)
            for phase in (*PHASES[:-1], *ALONE):
                if phase in arguments.only:
                    print(f"== {phase}", flush=True)
                    run_loss(bench) if phase == "loss" else run_timed(bench, phase, arguments.sizes)
    if "report" in arguments.only:
        write_report(arguments.results, arguments.report)
    print(f"done after {(time.monotonic() - started_s) / 60:.1f} minutes", flush=True)
    return 0
