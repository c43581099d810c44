"""LRU against `adaptive` on a CPU with experts on disk: time per token, and the cost of a plan.

The reference model with experts of 3 MiB, float32, no prefetch. All arms live in one process and
take turns of one prompt each, back and forth; all must generate the same tokens. A plan is timed
alone, in C++ and in Python.

    python -m benchmarks eviction_time
    python -m benchmarks eviction_time --given

Prompts are held-out ones that the model continues; with `--given` it decodes the texts of the
simulation instead (`eviction`), GIVEN_TOKENS of each after GIVEN_PROMPT, a turn for each text.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LogitsProcessorList

import specmoe_compile
from benchmarks.cpu_disk.arms import take_turns, turns_parser
from benchmarks.end_to_end.run import RECORD_MIB, held_out_prompts
from benchmarks.kit.given_text import GivenText
from benchmarks.kit.places import RESULTS
from benchmarks.simulation.eviction_texts import texts
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.records import spread
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.hf.attach import session_of
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.cpu.native.steps import cache_tables
from specmoe_compile.system.output import quiet_transformers, write_json

RESULT, GIVEN_RESULT = RESULTS / "eviction_time.json", RESULTS / "eviction_time_given.json"
SIZES, POLICIES = ("25%", "50%"), ("lru", "adaptive")
PLAN_SHAPES = ((32, 8, 4), (128, 32, 8))
"""E, S and K of the plans that are timed."""
PLANS = 4000
GIVEN_PROMPT, GIVEN_TOKENS = 64, 936
"""Together a window of the simulation's texts, 1000 tokens."""
AT_MOST = {"25%": 0.90, "50%": 0.80}


class Arm:
    """A cache size, a policy and a number format."""

    def __init__(
        self,
        checkpoint: Path,
        store_dir: Path,
        size: str,
        policy: Any,
        *,
        quantize: Any = None,
    ) -> None:
        self.size, self.policy = size, policy
        self.samples_ms: list[float] = []
        self.turns_ms: list[float] = []
        self.texts: list[list[int]] = []
        self.means_ms: list[float] = []
        self.inner: Any = specmoe_compile.from_pretrained(
            checkpoint,
            device="cpu",
            store="disk",
            store_dir=store_dir,
            expert_cache=size,
            cache_policy=policy,
            quantize=quantize,
            progress=False,
        )
        options: dict[str, Any] = {"prefetch": False}
        model = torch.compile(self.inner, backend="specmoe", options=options)
        self._settings: dict[str, Any] = {"cache_implementation": "static"}
        self._generator = HuggingFaceGenerator(model, self.inner, self._settings)

    def turn(self, prompt: Sequence[int], new_tokens: int, *, counts: bool) -> None:
        """Continue one prompt greedily, or decode what follows it where that is given, too."""
        clock, session = TokenClock(), session_of(self.inner)
        if len(prompt) > GIVEN_PROMPT:
            given = LogitsProcessorList([GivenText(torch.tensor(prompt))])
            self._settings["logits_processor"] = given
        tokens, _ = self._generator.generate(list(prompt[:GIVEN_PROMPT]), new_tokens, clock)
        if not counts:
            session.reset_stats()
            return
        self.texts.append(tokens)
        steps = clock.intervals_ms[1:]
        self.samples_ms += steps
        self.turns_ms.append(median(steps))
        self.means_ms.append(sum(steps) / len(steps))

    def record(self) -> dict[str, Any]:
        """What it did, as plain numbers."""
        stats = session_of(self.inner).stats
        total = stats.total
        return {
            "size": self.size,
            "policy": self.policy,
            "tpot_ms": spread(self.samples_ms),
            "mean_ms": sum(self.samples_ms) / len(self.samples_ms),
            "turns_ms": self.turns_ms,
            "mean_of_turns_ms": self.means_ms,
            "hit_rate": total.hits / (total.hits + total.misses),
            "misses": total.misses,
            "native_steps": total.native_steps,
            "steps": total.steps,
            "eviction": list(stats.eviction),
        }


def given_texts() -> dict[str, list[int]]:
    """The first window of each of the simulation's texts, a token a byte."""
    length = GIVEN_PROMPT + GIVEN_TOKENS
    return {name: list(text.encode()[:length]) for name, text in texts(2 * length).items()}


def measure(
    checkpoint: Path,
    store_dir: Path,
    sizes: Sequence[str],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> dict[str, Any]:
    """Every arm in turn, forth and back; the first prompt warms up."""
    arms = [Arm(checkpoint, store_dir, size, policy) for size in sizes for policy in POLICIES]
    # transformers sizes the static cache by the longest: one graph
    take_turns(arms, prompts, new_tokens, warm_up=2)
    if any(arm.texts != arms[0].texts for arm in arms):
        raise RuntimeError("the arms generated different tokens under policy exact")
    rows = [arm.record() for arm in arms]
    for arm in arms:
        specmoe_compile.close(arm.inner)
    ratios = {}
    for size in sizes:
        lru, adaptive = (next(a for a in arms if (a.size, a.policy) == (size, p)) for p in POLICIES)
        pairs = list(zip(adaptive.turns_ms, lru.turns_ms, strict=True))
        means = [sum(arm.samples_ms) for arm in (adaptive, lru)]
        ratios[size] = {
            "median_of_turns": median(a / b for a, b in pairs),
            "mean": means[0] / means[1],
        }
    return {"arms": rows, "ratios": ratios}


def plan_costs() -> list[dict[str, Any]]:
    """Microseconds of a layer's plan, on choices that are drawn unevenly."""
    rows = []
    for experts, slots, top_k in PLAN_SHAPES:
        rng = random.Random(0)
        weights = [1 / (1 + rank) for rank in range(experts)]
        steps: list[list[int]] = []
        while len(steps) < PLANS:
            wanted = list(dict.fromkeys(rng.choices(range(experts), weights, k=3 * top_k)))[:top_k]
            if len(wanted) == top_k:
                steps.append(wanted)
        for policy in POLICIES:
            shape = {"experts": experts, "slots": slots, "top_k": top_k, "policy": policy}
            costs = {
                name: _us_of_a_plan(make(_table(experts, slots, top_k, policy)), steps)
                for name, make in (("cpp_us", _in_cpp), ("python_us", _in_python))
            }
            rows.append({**shape, **costs})
    return rows


def _table(experts: int, slots: int, top_k: int, policy: Any) -> ExpertCache:
    return ExpertCache(num_experts=[experts], slots=[slots], policy=policy, spare=top_k)


def _in_python(table: ExpertCache) -> Callable[[list[int]], object]:
    return lambda wanted: table.plan(0, wanted)


def _in_cpp(table: ExpertCache) -> Callable[[list[int]], object]:
    """Plans on the tables, which the plan keeps alive."""
    library = library_or_none()
    if library is None:
        raise ValueError("The C++ engine is not there: install g++.")
    placed, evicted = (ctypes.c_int64 * 128)(), (ctypes.c_int64 * 64)()
    tables, counts = cache_tables(table, 0), (ctypes.c_int64 * 3)()

    def plan(wanted: list[int], owner: ExpertCache = table) -> None:
        asked = (ctypes.c_int64 * len(wanted))(*wanted)
        library.specmoe_cache_plan(tables, asked, len(wanted), None, 0, 0, placed, evicted, counts)

    return plan


def _us_of_a_plan(plan: Callable[[list[int]], object], steps: Sequence[list[int]]) -> float:
    """Median of rounds of 100; the call itself is in it."""
    for wanted in steps[:500]:
        plan(wanted)
    rounds = []
    for first in range(500, len(steps), 100):
        part = steps[first : first + 100]
        began = time.perf_counter()
        for wanted in part:
            plan(wanted)
        rounds.append((time.perf_counter() - began) * 1e6 / len(part))
    return median(rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0, or 1 where `adaptive` is slower than it may be."""
    parser = turns_parser("eviction_time", __doc__, result=RESULT, new_tokens=64)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--given", action="store_true", help="decode the simulation's texts")
    arguments: argparse.Namespace = parser.parse_args(argv)
    prompts: Sequence[Sequence[int]]
    settings: dict[str, Any]
    result_path = arguments.result
    if arguments.given:
        given = given_texts()
        prompts = [given["python"], *given.values()]
        settings = {"texts": list(given), "prompt": GIVEN_PROMPT, "new_tokens": GIVEN_TOKENS}
        result_path = GIVEN_RESULT if result_path == RESULT else result_path
    else:
        prompts = held_out_prompts(arguments.prompts + 1)
        settings = {"prompts": arguments.prompts, "new_tokens": arguments.new_tokens}
    quiet_transformers()
    checkpoint = widened_model(arguments.folder, RECORD_MIB, "float32")
    costs = plan_costs()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as store_dir:
        found = measure(
            checkpoint,
            Path(store_dir),
            arguments.sizes,
            prompts,
            settings["new_tokens"],
        )
    result = {
        "schema": 1,
        **provenance(),
        "load_average": list(os.getloadavg()),
        "model": {"record_mib": RECORD_MIB, "dtype": "float32", "layers": 8, "experts": 32},
        "settings": settings,
        "plans": costs,
        **found,
    }
    write_json(result_path, result)
    for row in costs:
        print(row)
    for row in found["arms"]:
        print(row["size"], row["policy"], row["tpot_ms"], f"{row['hit_rate']:.3f}")
    print(found["ratios"])
    return 0 if all(found["ratios"][s]["mean"] <= AT_MOST[s] for s in arguments.sizes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
