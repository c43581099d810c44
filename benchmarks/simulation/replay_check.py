"""Replay against real runs of the widened reference model: hits must be equal, times near.

    python -m benchmarks replay_check            # on a machine that does nothing else; 4 minutes
    python -m benchmarks replay_check --compare FOLDER       # again from the traces of such a run

Two runs give the parameters of the simulated machine, the one without a cache and the one with the
largest: bandwidth while reads are in progress, computing of a step, and what a fetched expert costs
beyond its read. How many reads share the disk is the smallest number of readers with which it gives
what it can. With these the other runs' times are predicted from their own traces. Times are means
over decode steps, because means add up. Results: `benchmarks/results/replay_check.json` and
`docs/results/replay.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import specmoe_compile
from benchmarks.end_to_end.run import RECORD_MIB, held_out_prompts
from benchmarks.kit.places import DOCUMENTS, RESULTS
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.probes import disk_rates
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.cli.bench import describe_model
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.hf.attach import session_of
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.replay.engine import ComputeTimes, ReplaySetting, replay
from specmoe_compile.replay.link import Link
from specmoe_compile.replay.measured import measured, timed_steps
from specmoe_compile.replay.recorder import TraceRecorder
from specmoe_compile.replay.steps import ReplaySteps
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import quiet_transformers, write_json
from specmoe_compile.system.sizes import parse_size

REPORT = DOCUMENTS / "replay.md"
RESULT = RESULTS / "replay_check.json"
TOLERANCE = 0.10
EXPERT_SHARE = 0.5
ABOUT = "about.json"

Found = Mapping[str, tuple[RoutingTrace, dict[str, Any]]]
"""Trace and counters of each cell, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A run to predict; without `prefetch` its hits must be equal."""

    name: str
    expert_cache: str
    cache_policy: Any = "lru"
    prefetch: bool = False


CALIBRATION = Cell(name="no cache", expert_cache="0")
COMPUTING = Cell(name="lru 75 %", expert_cache="75%")
CELLS = (
    CALIBRATION,
    COMPUTING,
    Cell(name="lru 25 %", expert_cache="25%"),
    Cell(name="lfu 25 %", expert_cache="25%", cache_policy="lfu"),
    Cell(name="lru 50 %", expert_cache="50%"),
    Cell(name="lru 25 %, prefetch", expert_cache="25%", prefetch=True),
    Cell(name="lru 50 %, prefetch", expert_cache="50%", prefetch=True),
)


class Run:
    """One cell's model, compiled and being recorded."""

    def __init__(self, cell: Cell, checkpoint: Path, store_dir: Path) -> None:
        self.cell = cell
        size: Any = 0 if cell.expert_cache == "0" else cell.expert_cache
        self.inner: Any = specmoe_compile.from_pretrained(
            checkpoint,
            device="cpu",
            store="disk",
            store_dir=store_dir,
            expert_cache=size,
            cache_policy=cell.cache_policy,
            progress=False,
        )
        options: dict[str, Any] = {"prefetch": cell.prefetch}
        model = torch.compile(self.inner, backend="specmoe", options=options)
        self._generator = HuggingFaceGenerator(
            model, self.inner, {"cache_implementation": "static"}
        )
        self.recorder = TraceRecorder(session_of(self.inner))
        self.warm_steps = 0

    def generate(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Continue a prompt greedily; returns the new tokens."""
        tokens, _ = self._generator.generate(list(prompt), new_tokens, TokenClock())
        return tokens

    def finish(self) -> tuple[RoutingTrace, Stats]:
        """Stop recording; returns the trace and what the session counted meanwhile."""
        trace = self.recorder.trace(self.cell.name)
        stats = session_of(self.inner).stats
        specmoe_compile.close(self.inner)
        return trace, stats


def run_cells(
    checkpoint: Path, store_dir: Path, *, repeats: int, new_tokens: int
) -> dict[str, tuple[RoutingTrace, Stats]]:
    """Generate with every cell in turn, back and forth; returns traces and counters."""
    runs = [Run(cell, checkpoint, store_dir) for cell in CELLS]
    prompts = held_out_prompts(max(2, repeats))
    for run in runs:
        # Twice: transformers sizes the static cache by the longest, so that one graph serves all.
        for _ in range(2):
            run.generate(prompts[0], new_tokens)
        run.warm_steps = 2 * (new_tokens - 1)
    for repeat in range(repeats):
        texts = {}
        for run in runs if repeat % 2 == 0 else reversed(runs):
            texts[run.cell.name] = run.generate(prompts[repeat], new_tokens)
            print(f"{repeat + 1}/{repeats} {run.cell.name}", flush=True)
        if len(set(map(tuple, texts.values()))) != 1:
            raise RuntimeError("the runs generated different tokens under policy exact")
    return {run.cell.name: run.finish() for run in runs}


def disk_readers(folder: Path) -> tuple[int, dict[int, float]]:
    """Readers with which the disk gives 95 % of its best rate; and its rates, GB/s."""
    rates = disk_rates(
        folder,
        record_bytes=RECORD_MIB << 20,
        threads=(1, 4),
        file_bytes=512 << 20,
        seconds=3.0,
    ).gbps
    enough = min(count for count, rate in rates.items() if rate >= 0.95 * max(rates.values()))
    return enough, rates


def machine_of(found: Found, warm_steps: int, readers: int) -> tuple[Link, ComputeTimes]:
    """The simulated machine, from two runs whose computing differs by what they fetched."""
    base, _ = found[CALIBRATION.name]
    full, _ = found[COMPUTING.name]
    counted = base.decode_steps()[warm_steps:]
    reading, computing = measured(base, counted), measured(full, counted)
    assert reading.link_gbps and reading.compute_ms and computing.compute_ms
    fetched = reading.fetched_per_step - computing.fetched_per_step
    fetched_ms = max(0.0, (reading.compute_ms - computing.compute_ms) / fetched)
    times = ComputeTimes.split(
        computing.compute_ms - fetched_ms * computing.fetched_per_step,
        layers=base.layers,
        top_k=base.top_k,
        expert_share=EXPERT_SHARE,
        fetched_ms=fetched_ms,
    )
    return Link(gbps=reading.link_gbps, readers=readers), times


def compare(
    found: Found,
    warm_steps: int,
    link: Link,
    times: ComputeTimes,
) -> list[dict[str, Any]]:
    """Predict every cell and put it beside what was measured."""
    rows = []
    for cell in CELLS:
        trace, stats = found[cell.name]
        speculation = session_speculation(trace)
        setting = ReplaySetting(
            cache_bytes=parse_size(cell.expert_cache, total_bytes=trace.total_bytes),
            cache_policy=cell.cache_policy,
            predictor="recorded" if cell.prefetch else "none",
            speculation=speculation,
        )
        done = replay(ReplaySteps(trace), setting, link, times)
        counted = trace.decode_steps()[warm_steps:]
        own = measured(trace, counted)
        assert own.tpot_ms is not None
        predicted_ms = fmean(done.steps[step].ms for step in timed_steps(trace, counted))
        rows.append(
            {
                **asdict(cell),
                "hits": [stats["hits"], done.total.hits],
                "misses": [stats["misses"], done.total.misses],
                "hits_equal": [(a["hits"], a["misses"]) for a in stats["layers"]]
                == [(b.hits, b.misses) for b in done.layers],
                "measured_ms": own.tpot_ms,
                "predicted_ms": predicted_ms,
                "ratio": predicted_ms / own.tpot_ms,
                "own_link_gbps": own.link_gbps,
                "own_compute_ms": own.compute_ms,
            }
        )
    return rows


def base_compute_ms(times: ComputeTimes, trace: RoutingTrace) -> float:
    """Computing of a step with everything cached."""
    return trace.layers * (times.layer_ms + trace.top_k * times.expert_ms)


def session_speculation(trace: RoutingTrace) -> Any:
    """The speculation that a run was set to."""
    from specmoe_compile.options import SessionOptions

    given = dict(trace.setting["speculation"])
    given.pop("captures", None)
    return SessionOptions(**{**given, "skip_layers": tuple(given["skip_layers"])})


def measure(checkpoint: Path, arguments: argparse.Namespace, traces: Path) -> dict[str, Any]:
    """Run all cells, leave traces and counters in a folder; returns what to know about the run."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as store_dir:
        found = run_cells(
            checkpoint,
            Path(store_dir),
            repeats=arguments.repeats,
            new_tokens=arguments.new_tokens,
        )
    readers, disk_gbps = disk_readers(arguments.folder)
    about = {
        **provenance(),
        "model": describe_model(str(checkpoint), "float32"),
        "load_average": list(os.getloadavg()),
        "disk_gbps": disk_gbps,
        "readers": readers,
        "settings": {
            "repeats": arguments.repeats,
            "new_tokens": arguments.new_tokens,
            "warm_steps": 2 * (arguments.new_tokens - 1),
            "expert_share": EXPERT_SHARE,
            "seed": 0,
        },
    }
    for name, (trace, stats) in found.items():
        trace.save(traces / f"{name}.safetensors")
        write_json(traces / f"{name}.json", stats.as_dict())
    write_json(traces / ABOUT, about)
    if arguments.keep is not None:
        shutil.copytree(traces, arguments.keep, dirs_exist_ok=True)
    return about


def result_of(traces: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the runs that left traces in a folder with their replays."""
    found = {
        cell.name: (
            RoutingTrace.load(traces / f"{cell.name}.safetensors"),
            json.loads((traces / f"{cell.name}.json").read_text(encoding="utf-8")),
        )
        for cell in CELLS
    }
    warm_steps = about["settings"]["warm_steps"]
    link, times = machine_of(found, warm_steps, about["readers"])
    return {
        "schema": 1,
        **about,
        "parameters": {
            "link": asdict(link),
            "compute": asdict(times),
            "compute_ms": base_compute_ms(times, found[CALIBRATION.name][0]),
            "disk_gbps": about["disk_gbps"],
        },
        "cells": compare(found, warm_steps, link, times),
    }


def write_report(result: Mapping[str, Any], path: Path) -> bool:
    """Write the document; returns whether what must hold does."""
    exact = [row for row in result["cells"] if not row["prefetch"]]
    equal = all(row["hits_equal"] for row in exact)
    near = all(abs(row["ratio"] - 1) <= TOLERANCE for row in exact)
    table = markdown_table(
        ("run", "hits, real", "hits, replayed", "ms/token, real", "replayed", "ratio"),
        [
            (
                row["name"],
                f"{row['hits'][0]} of {sum(_pair(row, 0))}",
                f"{row['hits'][1]} of {sum(_pair(row, 1))}",
                f"{row['measured_ms']:.2f}",
                f"{row['predicted_ms']:.2f}",
                f"{row['ratio']:.3f}",
            )
            for row in result["cells"]
        ],
    )
    machine, settings = result["parameters"], result["settings"]
    text = f"""# Replay against real runs

Written by `python -m benchmarks replay_check` from `benchmarks/results/replay_check.json`. Commit:
{str(result["commit"])[:12]}; {result["machine"]["cpu"]}, {result["machine"]["cores"]} cores.

The reference model with experts of 3 MiB, in float32, on disk. The simulated machine:

- {machine["link"]["gbps"]:.2f} GB/s while reads are in progress, as in the run without a cache;
  reads served {machine["link"]["readers"]} at a time, as many as the disk needs (alone, with 1
  and 4 readers: {", ".join(f"{rate:.2f}" for rate in machine["disk_gbps"].values())} GB/s);
- {machine["compute_ms"]:.2f} ms of computing per step, half of it taken to be the experts', and
  {machine["compute"]["fetched_ms"]:.3f} ms more for each fetched expert: what the times outside of
  waits are in the runs without a cache and with 75 %.

So the first two runs gave the parameters; the others are predicted. The form of the model (reads
one after the other, a fixed time per fetched expert) was chosen on this very run: without it the
same run was up to 65 % off where little is read. So these ratios are not those of a run never seen.

{table}

Without prefetch, hits and misses of every layer are {"equal" if equal else "**not all equal**"},
prefill included; times per token are {"within" if near else "**not all within**"}
{100 * TOLERANCE:.0f} %. With prefetch neither is claimed: what arrives in time decides what is
cancelled and what is turned off.

{settings["repeats"]} prompts of 64 tokens, {settings["new_tokens"]} new tokens each, runs
interleaved; means of the steps after {settings["warm_steps"]} of warm-up, without each text's last
step. All arms generated the
same tokens.
"""
    path.write_text(text, encoding="utf-8")
    print(table)
    return equal and near


def _pair(row: Mapping[str, Any], place: int) -> tuple[int, int]:
    return row["hits"][place], row["misses"][place]


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; returns 0, 1 if something that must hold does not, or 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks replay_check")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--compare", type=Path, help="folder of kept traces; nothing is run")
    parser.add_argument("--keep", type=Path, help="folder to keep the traces in")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "demo")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--report", type=Path, default=REPORT)
    arguments = parser.parse_args(argv)
    quiet_transformers()
    checkpoint = widened_model(arguments.folder, RECORD_MIB, "float32")
    if arguments.compare is None:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as traces:
            about = measure(checkpoint, arguments, Path(traces))
            result = result_of(Path(traces), about)
    else:
        about = json.loads((arguments.compare / ABOUT).read_text(encoding="utf-8"))
        result = result_of(arguments.compare, about)
    write_json(arguments.result, result)
    return 0 if write_report(result, arguments.report) else 1
