"""What speculation is worth on the widened reference model, all arms in one interleaved run.

    python -m benchmarks speculation                  # everything, on a quiet machine
    python -m benchmarks speculation --only report    # the document from the result files

Phases, each with its own result in `benchmarks/results/speculation_*.json`:

- prepare      widen, pack, compile once
- timing       time per token of every arm and cache size, A B C C B A; needs a quiet machine
- paired       the claims about time: the arms they compare in turns within one process, so that
               neither the machine's drift nor a process that is slow for life counts
- exact        64 prompts x 64 tokens against the unmodified model, with sabotaged predictors; takes
               half the time with the store in memory (--folder on a tmpfs)
- eval         what each policy costs in output, on the model as trained, with every list of
               skipped layers
- eval_wide    the same on the widened model, no layer skipped, few prompts
- compile      what the passes add to compile time; needs a quiet machine
- report       docs/results/log/speculation.md and fidelity.md
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.end_to_end.run import EXPERT_CACHE, PROMPT_TOKENS, RECORD_MIB, held_out_prompts
from benchmarks.kit.command import run_parser
from benchmarks.kit.paired import run_paired
from benchmarks.kit.places import LOG, RESULTS
from benchmarks.kit.traffic import counted
from benchmarks.speculation.exact import BATCHES, merged, run_exact
from benchmarks.speculation.fidelity import LOSS_TOKENS, SKIPS, run_eval, write_fidelity
from benchmarks.speculation.report import write_report
from benchmarks.speculation.report_paired import NO_CACHE
from benchmarks.speculation.report_timing import AGAIN
from specmoe_compile.bench.harness import run_pack
from specmoe_compile.bench.live_worker import run_worker
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.records import ArmJob, ArmRun, arm_record, spread
from specmoe_compile.cli.bench import describe_model
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import quiet_transformers, write_json

REPORT = LOG / "speculation.md"
FIDELITY = LOG / "fidelity.md"
PHASES = ("prepare", "timing", "paired", "exact", "eval", "eval_wide", "compile", "report")
DTYPE = "float32"
WIDE_PROMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One column of the comparison: an arm with a cache size and options."""

    name: str
    arm: str
    expert_cache: str = EXPERT_CACHE
    options: tuple[tuple[str, Any], ...] = ()


CELLS = (
    Cell(name="on_demand", arm="on_demand"),
    Cell(name="prefetch", arm="prefetch"),
    Cell(name="cache 25%", arm="cache"),
    Cell(name="specmoe 25%", arm="specmoe", options=(("prefetch", True),)),
    Cell(name="cache 50%", arm="cache", expert_cache="50%"),
    Cell(name="specmoe 50%", arm="specmoe", expert_cache="50%", options=(("prefetch", True),)),
    Cell(name=AGAIN, arm="cache", expert_cache="50%"),
    Cell(
        name="default_vector 0.2, 25%",
        arm="default_vector",
        options=(("default_vector_threshold", 0.2),),
    ),
    Cell(name="commit 25%", arm="commit"),
    Cell(name="resident", arm="resident"),
)

PAIRS = {
    NO_CACHE: {
        "on_demand": "on_demand",
        "prefetch": "prefetch",
        "on_demand again": "on_demand",
        "resident": "resident",
    },
    "25%": {"cache": "cache 25%", "specmoe": "specmoe 25%", "cache again": "cache 25%"},
    "50%": {"cache": "cache 50%", "specmoe": "specmoe 50%", "cache again": "cache 50%"},
}
"""By group: arms of phase `paired` and the cells that they run."""


class Place:
    """Where the model, its store and the results are."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.folder
        self.results: Path = arguments.results
        self.repeats: int = arguments.repeats
        self.prompts: int = arguments.prompts
        self.new_tokens: int = arguments.new_tokens
        self.timed_prompts: int = arguments.timed_prompts
        self.cells = tuple(cell for cell in CELLS if cell.name in arguments.cells)
        self.provenance = provenance()  # of the code that runs, not of a later one

    def model(self) -> Path:
        """The widened reference model, made when it is not there."""
        return widened_model(self.folder, RECORD_MIB, DTYPE)

    def store_dir(self) -> Path:
        """Where its expert store is or will be."""
        return self.folder / f"{self.model().name}-store"

    def job(self, cell: Cell, work_dir: str, prompts: list[list[int]], **changes: Any) -> ArmJob:
        """What a worker process is to measure."""
        return ArmJob(
            arm=cell.arm,
            model=str(self.model()),
            prompts=prompts,
            new_tokens=self.new_tokens,
            device="cpu",
            dtype=DTYPE,
            expert_cache=cell.expert_cache,
            store_dir=str(self.store_dir()),
            options={**dict(cell.options), **changes},
            work_dir=work_dir,
        )

    def write(self, name: str, value: dict[str, Any], model: Path | None = None) -> None:
        """Write one phase's result with what it was measured on, the widened model by default."""
        self.results.mkdir(parents=True, exist_ok=True)
        about = {
            "schema": 1,
            **self.provenance,
            "model": describe_model(str(model or self.model()), DTYPE),
            "load_average": list(os.getloadavg()),
        }
        path = self.results / f"speculation_{name}.json"
        write_json(path, {**value, **about})
        print(f"wrote {path.name}", flush=True)


def run_prepare(place: Place) -> None:
    """Pack the experts and compile every graph once, so that `timing` does neither."""
    place.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        run_pack(str(place.model()), str(place.store_dir()), DTYPE, cap=None, work_dir=work)
        for cell in CELLS:
            run = run_worker(place.job(cell, work, held_out_prompts(1)))
            print(f"{cell.name}: {run.compile_s:.1f} s", flush=True)


def run_timing(place: Place) -> None:
    """Time per token of every cell, repeats interleaved."""
    # As many tokens as prompts and repeats allow: speculation needs some steps to learn what pays.
    prompts = held_out_prompts(place.timed_prompts)
    runs: dict[str, list[ArmRun]] = {cell.name: [] for cell in place.cells}
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        for repeat in range(place.repeats):
            # Back and forth, so that a drift of the machine hits neighbours alike.
            for cell in place.cells if repeat % 2 == 0 else reversed(place.cells):
                run = run_worker(place.job(cell, work, prompts))
                runs[cell.name].append(run)
                median_ms = median(run.tpot_samples_ms)
                print(f"{repeat + 1}/{place.repeats} {cell.name}: {median_ms:.2f} ms", flush=True)
    records = []
    for cell in place.cells:
        record = arm_record(cell.name, runs[cell.name], memory_cap_bytes=None)
        record["tpot_ms"] = spread(
            medians_by_token([run.tpot_samples_ms for run in runs[cell.name]])
        )
        record["medians_ms"] = [median(run.tpot_samples_ms) for run in runs[cell.name]]
        counters = [run.decode for run in runs[cell.name] if run.decode]
        record["totals"] = [counted([run]) for run in runs[cell.name] if run.decode]
        record["layers"] = counters[0]["layers"] if counters else None
        del record["tokens"], record["runs"]
        records.append(record)
    settings = {
        "new_tokens": place.new_tokens,
        "prompts": len(prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "repeats": place.repeats,
        "order": "interleaved, every second time backwards",
        "seed": 0,
    }
    place.write("timing", {"arms": records, "settings": settings})


def run_pairs(place: Place) -> None:
    """Time per token of the arms that are compared, each group in turns within this process."""
    prompts = held_out_prompts(place.timed_prompts)
    groups: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        run_pack(str(place.model()), str(place.store_dir()), DTYPE, cap=None, work_dir=work)
        cells = {cell.name: cell for cell in CELLS}
        for group, names in PAIRS.items():
            print(f"= {group}", flush=True)
            jobs = {name: place.job(cells[cell], work, prompts) for name, cell in names.items()}
            arms, different = run_paired(jobs, place.repeats)
            records = {name: arm.record() for name, arm in arms.items()}
            groups[group] = {"arms": records, "different_token_lists": different}
    settings = {
        "new_tokens": place.new_tokens,
        "prompts": len(prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "rounds": place.repeats,
        "seed": 0,
    }
    place.write("paired", {"groups": groups, "settings": settings})


def medians_by_token(repeats: Sequence[Sequence[float]]) -> list[float]:
    """Median of each token's times over the repeats, which generate the same tokens.

    What disturbs the machine during one repeat of a token does not count.
    """
    return [median(times) for times in zip(*repeats, strict=True)]


def run_compile(place: Place) -> None:
    """Compile time with and without the passes, caches empty, and the passes' own time."""
    pairs: list[dict[str, float]] = []
    prompts = held_out_prompts(1)
    cell = next(cell for cell in CELLS if cell.arm == "specmoe")
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        for repeat in range(place.repeats):
            pair: dict[str, float] = {}
            for prefetch in (False, True) if repeat % 2 else (True, False):
                with tempfile.TemporaryDirectory(dir=work) as cache:
                    job = place.job(cell, work, prompts, prefetch=prefetch)
                    run = run_worker(job, environment={"TORCHINDUCTOR_CACHE_DIR": cache})
                name = "with" if prefetch else "without"
                pair[f"{name}_s"] = run.compile_s
                if prefetch:
                    pair["passes_s"] = run.passes_ms / 1e3
            pairs.append(pair)
            print(pair, flush=True)
    place.write("compile", {"pairs": pairs})


def read_or_none(folder: Path, name: str) -> dict[str, Any] | None:
    """The result file of a phase, if there is one."""
    path = folder / f"speculation_{name}.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = run_parser("speculation", __doc__)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--repeats", type=int, default=4, help="of timing and compile")
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", choices=names, default=names, help="of timing")
    parser.add_argument("--timed-prompts", type=int, default=4, help="per run of timing")
    parser.add_argument("--prompts", type=int, default=64, help="of the token comparison")
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        choices=BATCHES,
        default=list(BATCHES),
        help="batch sizes of exact; rows of the others are kept as they are in the result file",
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--loss-tokens", type=int, default=LOSS_TOKENS, help="of the held-out text")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "demo")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--report", type=Path, default=REPORT, help="the document to write")
    parser.add_argument("--fidelity", type=Path, default=FIDELITY, help="the other one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases asked for; returns 0, 1 if something that must hold does not, or 2."""
    arguments = parse_arguments(argv)
    place = Place(arguments)
    kept = read_or_none(place.results, "exact") if len(arguments.batches) < len(BATCHES) else None
    quiet_transformers()
    phases: dict[str, Callable[[], None]] = {
        "prepare": lambda: run_prepare(place),
        "timing": lambda: run_timing(place),
        "paired": lambda: run_pairs(place),
        "exact": lambda: run_exact(
            place.model(),
            place.store_dir(),
            held_out_prompts(place.prompts),
            place.new_tokens,
            arguments.batches,
            lambda made: place.write("exact", merged(kept, made, place.provenance["commit"])),
        ),
        "eval": lambda: run_eval(
            CHECKPOINT_DIR,
            place.folder / "reference-store",
            prompts=place.prompts,
            new_tokens=place.new_tokens,
            loss_tokens=arguments.loss_tokens,
            skips=SKIPS,
            on_policy=lambda result: place.write("eval", result, CHECKPOINT_DIR),
        ),
        "eval_wide": lambda: run_eval(
            place.model(),
            place.store_dir(),
            prompts=min(WIDE_PROMPTS, place.prompts),
            new_tokens=place.new_tokens,
            loss_tokens=arguments.loss_tokens,
            skips=("none",),
            on_policy=lambda result: place.write("eval_wide", result),
        ),
        "compile": lambda: run_compile(place),
    }
    for name, run in phases.items():
        if name in arguments.only:
            print(f"== {name}", flush=True)
            run()
    if "report" in arguments.only:
        every = {name: read_or_none(place.results, name) for name in phases}
        found = {name: result for name, result in every.items() if result is not None}
        if "eval" in found:
            write_fidelity(found["eval"], found.get("eval_wide"), arguments.fidelity)
        return 0 if write_report(found, arguments.report) else 1
    return 0
