"""The published end-to-end benchmark: the reference model with experts of 3 MiB, 805 MB in all.

    python -m benchmarks end_to_end            everything; an hour or so on 2 cores
    python -m benchmarks end_to_end --quick    one table, no files in the repository
    python -m benchmarks end_to_end --only timing --dtypes float32
    python -m benchmarks end_to_end --only report

Phases, each with its own result in `benchmarks/results/end_to_end_*.json`:

- tokens   greedy tokens and logits of many prompts, against the unmodified model
- timing   time per token of every arm, interleaved, disk arms under a memory cap; what
           `specmoe doctor` measures, before and after
- disk     the rate at which on_demand reads, and the disk's own, in turn, because it drifts
- startup  time to the first token of a first and of a second process
- report   writes docs/results/log/end_to_end.md and the README's table, and says what holds

Run it on a machine that does nothing else: the load average is in every result.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end.report import write_readme_section, write_report
from benchmarks.end_to_end.tokens import CONTROL, compare_generations
from benchmarks.kit.command import run_parser
from benchmarks.kit.places import LOG, RESULTS, ROOT
from benchmarks.reference_model.data import default_source, held_out_windows
from benchmarks.reference_model.tokenizer import PAD_ID
from specmoe_compile.bench.harness import run_pack
from specmoe_compile.bench.live_worker import run_worker
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.measure import measure, permitted_cap
from specmoe_compile.bench.records import ArmJob, spread
from specmoe_compile.cli.bench import describe_model, print_table
from specmoe_compile.cli.doctor import examine
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import quiet_transformers, write_json

REPORT = LOG / "end_to_end.md"

RECORD_MIB = 3
MEMORY_CAP_BYTES = 700 << 20
EXPERT_CACHE = "25%"
NEW_TOKENS = 64
PROMPT_TOKENS = 64
DISK_TURNS = 6
TIMING_ARMS = ("accelerate", "accelerate_auto", "on_demand", "cache", "eager", "resident")
TOKEN_ARMS = ("eager", CONTROL, "on_demand", "cache", "resident")
PHASES = ("tokens", "timing", "disk", "startup", "report")
DTYPES = ("float32", "bfloat16")


class Plan:
    """Where things are, and how much to run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.place: Path = arguments.folder
        self.repeats: int = arguments.repeats
        self.prompts: int = arguments.prompts
        self.dtypes: list[str] = arguments.dtypes
        self.results: Path = arguments.results

    def model(self, dtype: str) -> Path:
        """The widened reference model, made when it is not there."""
        return widened_model(self.place, RECORD_MIB, dtype)

    def store_dir(self, dtype: str) -> Path:
        """Where its expert store is or will be."""
        return self.place / f"{self.model(dtype).name}-store"

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write one phase's result."""
        self.results.mkdir(parents=True, exist_ok=True)
        path = self.results / f"end_to_end_{name}.json"
        write_json(path, {**value, "load_average": list(os.getloadavg())})
        print(f"wrote {path.name}", flush=True)


def held_out_prompts(count: int) -> list[list[int]]:
    """Prompts of PROMPT_TOKENS bytes from files that training never saw, spread evenly."""
    windows = held_out_windows(default_source(), PROMPT_TOKENS - 1)
    windows = windows[(windows != PAD_ID).all(dim=1)]
    picks = torch.linspace(0, len(windows) - 1, count).round().long()
    return windows[picks].tolist()


def _settings(dtype: str, **changes: Any) -> dict[str, Any]:
    """What all arms of a phase share."""
    return {
        "new_tokens": NEW_TOKENS,
        "warmup_tokens": 8,
        "skip_tokens": 4,
        "device": "cpu",
        "dtype": dtype,
        "expert_cache": EXPERT_CACHE,
        "kv_cache": "static",
        **changes,
    }


def _prompt_note(prompts: list[list[int]]) -> dict[str, Any]:
    return {
        "count": len(prompts),
        "tokens": PROMPT_TOKENS,
        "source": "held-out files of the Python standard library",
        "sha256": hashlib.sha256(repr(prompts).encode()).hexdigest(),
    }


def run_timing(plan: Plan, dtype: str) -> None:
    """Time per token of every arm, the disk measured before and after."""
    model, store_dir = plan.model(dtype), plan.store_dir(dtype)
    prompts = held_out_prompts(1)
    # Packed anew, so that the memory which packing needs is measured too.
    shutil.rmtree(store_dir, ignore_errors=True)

    def disk() -> dict[str, Any]:
        return examine(plan.place, RECORD_MIB << 20, 512 << 20, 3.0)

    before = disk()
    result = measure(
        str(model),
        TIMING_ARMS,
        prompts,
        _settings(dtype),
        store_dir=store_dir,
        memory_cap_bytes=MEMORY_CAP_BYTES,
        repeats=plan.repeats,
    )
    after = disk()
    result["model"] = describe_model(str(model), dtype)
    result["prompts"] = _prompt_note(prompts)
    result["disk"] = {
        "before": before["disk"],
        "after": after["disk"],
        "memory": before["memory"],
        "reader_threads": before["reader_threads"],
    }
    print_table(result)
    plan.write(f"timing_{dtype}", result)


def run_tokens(plan: Plan, dtype: str) -> None:
    """Tokens and logits of many prompts, against the unmodified model; times do not count."""
    model, store_dir = plan.model(dtype), plan.store_dir(dtype)
    prompts = held_out_prompts(plan.prompts)
    with tempfile.TemporaryDirectory(dir=plan.place) as folder:
        files = {name: str(Path(folder) / f"{name}.pt") for name in TOKEN_ARMS}
        result = measure(
            str(model),
            TOKEN_ARMS,
            prompts,
            _settings(dtype),
            store_dir=store_dir,
            memory_cap_bytes=None,
            repeats=1,
            save_logits=files,
        )
        arms = {arm["name"]: arm for arm in result["arms"]}
        logits = {name: torch.load(files[name]) for name in arms}
    result["comparison"] = {
        name: compare_generations(
            arms["eager"]["tokens"], logits["eager"], arm["tokens"], logits[name]
        )
        for name, arm in arms.items()
        if name != "eager"
    }
    for arm in result["arms"]:
        # Their hash stays; times do not count here.
        del arm["tokens"], arm["runs"]
    result["model"] = describe_model(str(model), dtype)
    result["prompts"] = _prompt_note(prompts)
    plan.write(f"tokens_{dtype}", result)


def run_disk(plan: Plan, dtype: str) -> None:
    """The disk, on_demand, the disk, on_demand, ..., the disk."""
    model, store_dir = plan.model(dtype), plan.store_dir(dtype)
    disk_gbps: list[float] = []
    read_gbps: list[float] = []
    waiting_gbps: list[float] = []
    with tempfile.TemporaryDirectory(dir=plan.place) as folder:
        run_pack(str(model), str(store_dir), dtype, cap=None, work_dir=folder)
        job = ArmJob(
            arm="on_demand",
            model=str(model),
            prompts=held_out_prompts(1),
            store_dir=str(store_dir),
            work_dir=folder,
            **_settings(dtype),
        )
        for turn in range(DISK_TURNS + 1):
            # The store itself: a file that was just written is faster, see `disk_rates`.
            seen = examine(store_dir, RECORD_MIB << 20, 512 << 20, 2.0)
            disk_gbps.append(seen["disk"]["gbps"][str(seen["reader_threads"])])
            if turn < DISK_TURNS:
                decode = run_worker(job).decode
                assert decode is not None, "on_demand has counters"
                total = decode["total"]
                read_gbps.append(total["demand_bytes"] / 1e6 / decode["read_busy_ms"])
                waiting_gbps.append(total["stall_bytes"] / 1e6 / total["stall_ms"])
                print(
                    f"disk {disk_gbps[-1]:.2f} GB/s, on_demand {waiting_gbps[-1]:.2f} while it"
                    f" waits, {read_gbps[-1]:.2f} while it reads",
                    flush=True,
                )
    plan.write(
        f"disk_{dtype}",
        {
            "schema": 1,
            **provenance(),
            "model": describe_model(str(model), dtype),
            "disk_gbps": disk_gbps,
            "on_demand_gbps": read_gbps,
            "on_demand_waiting_gbps": waiting_gbps,
        },
    )


def run_startup(plan: Plan, dtype: str) -> None:
    """A first process with empty compile caches, then a second one; three such pairs."""
    model, store_dir = plan.model(dtype), plan.store_dir(dtype)
    pairs: list[dict[str, float]] = []
    # The store is there already from the timing; if not, this packs it outside of any time.
    measure(
        str(model),
        ("cache",),
        held_out_prompts(1),
        _settings(dtype, new_tokens=8),
        store_dir=store_dir,
        memory_cap_bytes=None,
        repeats=1,
    )
    for _ in range(plan.repeats):
        with tempfile.TemporaryDirectory(dir=plan.place) as folder:
            job = ArmJob(
                arm="cache",
                model=str(model),
                prompts=held_out_prompts(1),
                store_dir=str(store_dir),
                work_dir=folder,
                **_settings(dtype, new_tokens=8),
            )
            environment = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
            first, second = (run_worker(job, environment=environment) for _ in range(2))
        pairs.append(
            {
                "first_s": first.first_token_s,
                "first_compile_s": first.compile_s,
                "second_s": second.first_token_s,
                "second_compile_s": second.compile_s,
            }
        )
        print(f"first {first.first_token_s:.1f} s, second {second.first_token_s:.1f} s", flush=True)
    plan.write(
        f"startup_{dtype}",
        {
            "schema": 1,
            **provenance(),
            "model": describe_model(str(model), dtype),
            "pairs": pairs,
            "first_s": spread([pair["first_s"] for pair in pairs]),
            "second_s": spread([pair["second_s"] for pair in pairs]),
        },
    )


def run_quick(plan: Plan) -> None:
    """One table in a few minutes; writes nothing into the repository."""
    dtype = plan.dtypes[0]
    result = measure(
        str(plan.model(dtype)),
        ("accelerate", "on_demand", "cache", "resident", "eager"),
        held_out_prompts(1),
        _settings(dtype, new_tokens=32),
        store_dir=plan.store_dir(dtype),
        memory_cap_bytes=permitted_cap(MEMORY_CAP_BYTES),
        repeats=1,
    )
    result["model"] = describe_model(str(plan.model(dtype)), dtype)
    print_table(result)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = run_parser("end_to_end", __doc__)
    parser.add_argument("--quick", action="store_true", help="one table, no files")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3, help="of timing and startup")
    parser.add_argument("--prompts", type=int, default=64, help="of the token comparison")
    parser.add_argument(
        "--folder", type=Path, default=cache_folder() / "demo", help="for models and stores"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--report", type=Path, default=REPORT, help="the document to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases asked for; returns 0, 1 if something that must hold does not, or 2."""
    arguments = parse_arguments(argv)
    plan = Plan(arguments)
    quiet_transformers()
    phases: dict[str, Callable[[Plan, str], None]] = {
        # First, so that the timing under the cap finds its graphs compiled: a compiler beside the
        # model does not fit under it.
        "tokens": run_tokens,
        "timing": run_timing,
        "disk": run_disk,
        "startup": run_startup,
    }
    if arguments.quick:
        run_quick(plan)
        return 0
    for dtype in plan.dtypes:
        for name, run in phases.items():
            if name in arguments.only:
                print(f"== {name}, {dtype}", flush=True)
                run(plan, dtype)
    if "report" in arguments.only:
        holds = write_report(plan.results, arguments.report)
        if arguments.report == REPORT:
            write_readme_section(plan.results, ROOT / "README.md")
        return 0 if holds else 1
    return 0
