"""Time per token beside busy processes, with all experts in memory, on two threads and on one.

The reference model with experts of 3 MiB in float32. One process that computes for ever on each
core that this one may use; with them and without, in turns of one prompt each, in front of each a
shorter one that is not counted: that the other processes are there is seen in some tokens. What is
asked: on all cores at most 2.5 times the time without them, and not more than on one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import specmoe_compile
from benchmarks.cpu_disk.arms import turns_parser
from benchmarks.end_to_end.run import RECORD_MIB, held_out_prompts
from benchmarks.kit.places import RESULTS
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.records import spread
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.runtime.cpu.native.layer import engine_or_none
from specmoe_compile.system.machine import cpu_count
from specmoe_compile.system.output import quiet_transformers, write_json

RESULT = RESULTS / "cpu_busy.json"
AT_MOST = 2.5
SETTLE_S = 0.5
SETTLE_TOKENS = 16
QUIET, BUSY = "quiet", "busy"


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute until the block ends."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        for process in found:
            process.kill()
            process.wait()
        time.sleep(SETTLE_S)


def measure(
    checkpoint: Path, store_dir: Path, cores: int, rounds: int, new_tokens: int
) -> dict[tuple[str, int], list[list[float]]]:
    """Times of tokens in ms, a list for each turn, by machine and threads."""
    inner = specmoe_compile.from_pretrained(
        str(checkpoint),
        device="cpu",
        dtype="float32",
        store="ram",
        expert_cache="100%",
        store_dir=str(store_dir),
        progress=False,
    )
    model: Any = torch.compile(inner, backend="specmoe", options={"prefetch": False})
    generator = HuggingFaceGenerator(model, inner, {})
    prompt = held_out_prompts(1)[0]
    found: dict[tuple[str, int], list[list[float]]] = {}

    def turn(machine: str, threads: int, *, counts: bool = True) -> None:
        torch.set_num_threads(threads)
        engine_or_none()  # takes over how many
        generator.generate(prompt, SETTLE_TOKENS, TokenClock())
        clock = TokenClock()
        generator.generate(prompt, new_tokens, clock)
        if counts:
            found.setdefault((machine, threads), []).append(clock.intervals_ms[1:])

    with torch.inference_mode():
        for threads in (cores, 1, cores, 1):
            turn(QUIET, threads, counts=False)
        for number in range(rounds):
            order = (cores, 1) if number % 2 == 0 else (1, cores)
            for threads in order:
                turn(QUIET, threads)
            with busy_processes(cores):
                for threads in (*order, *order):
                    turn(BUSY, threads)
    specmoe_compile.close(inner)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0, or 1 where it takes more than it may."""
    parser = turns_parser("cpu_busy", __doc__, result=RESULT, new_tokens=96)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args(argv)
    quiet_transformers()
    checkpoint = widened_model(arguments.folder, RECORD_MIB, "float32")
    cores = cpu_count()
    store_dir = arguments.folder / f"{checkpoint.name}-store"
    found = measure(checkpoint, store_dir, cores, arguments.rounds, arguments.new_tokens)
    rows: list[dict[str, Any]] = [
        {
            "machine": machine,
            "threads": threads,
            "tpot_ms": spread([ms for turn in turns for ms in turn]),
            "mean_ms": round(sum(map(sum, turns)) / sum(map(len, turns)), 4),
            "turns_ms": [round(median(turn), 4) for turn in turns],
        }
        for (machine, threads), turns in found.items()
    ]
    typical = {(row["machine"], row["threads"]): row["tpot_ms"]["p50"] for row in rows}
    mean = {(row["machine"], row["threads"]): row["mean_ms"] for row in rows}
    ratios = {
        "busy_to_quiet": round(typical[BUSY, cores] / typical[QUIET, cores], 4),
        "busy_to_busy_on_one_thread": round(typical[BUSY, cores] / typical[BUSY, 1], 4),
        "mean_busy_to_busy_on_one_thread": round(mean[BUSY, cores] / mean[BUSY, 1], 4),
        "at_most": AT_MOST,
    }
    write_json(
        arguments.result,
        {
            "schema": 1,
            **provenance(),
            "load_average": list(os.getloadavg()),
            "settings": {
                "rounds": arguments.rounds,
                "new_tokens": arguments.new_tokens,
                "settle_tokens": SETTLE_TOKENS,
            },
            "seed": 0,
            "busy_processes": cores,
            "rows": rows,
            "ratios": ratios,
        },
    )
    for row in rows:
        print(row["machine"], row["threads"], row["tpot_ms"], f"mean {row['mean_ms']:.2f}")
    print(ratios)
    return int(ratios["busy_to_quiet"] > AT_MOST or ratios["busy_to_busy_on_one_thread"] > 1.0)


if __name__ == "__main__":
    raise SystemExit(main())
