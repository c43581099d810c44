"""A token through `generate` on a GPU at full size: wall time, device time, and kernel by kernel.

    python -m benchmarks gpu_token --out token.json --phases attention
    python -m benchmarks gpu_token --out token.json --contexts 1024
    python -m benchmarks gpu_token --out token.json --contexts 65536 --arms resident
    python -m benchmarks gpu_token --out dry.json --dry

Phase `attention` compares the decode attention of one layer with PyTorch's, without a model. Phase
`cells` builds the full model (random weights, routing of a trace, a context that is there already),
and runs `model.generate` on it: greedy, with a streamer and a token that ends the text, so that
each token is read. Rows are kept per arm, context and attention, and an existing file is gone on
with. Wall times are from one token at the streamer to the next. Device times are the time that
at least one kernel or copy covers, from a profiled run, per token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.generation.streamers import BaseStreamer

from benchmarks.full_size.arms import (
    ARMS,
    Bench,
    SlotLimit,
    Steps,
    fill_slots,
    free_memory,
    learn_vectors,
    sharing_groups,
)
from benchmarks.full_size.attention import measure_attention
from benchmarks.full_size.model import (
    DRY_SHAPES,
    SEED,
    SHAPES,
    FilledCache,
    RandomStore,
    build_skeleton,
)
from benchmarks.full_size.profile import covered_us, is_transfer
from benchmarks.full_size.routing import trace_predictions
from benchmarks.full_size.run import VECTOR_TOKENS
from benchmarks.full_size.trace import RoutingTrace, map_trace, record_reference, texts_needed
from benchmarks.kit.command import run_parser
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.records import quantile
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.hf.run_ahead import generation_stats, reset_generation_stats
from specmoe_compile.system.output import USER_ERRORS, sentence, write_json

PHASES = ("attention", "cells")
CELL_ARMS = ("resident", "specmoe_50", "specmoe_25", "cache_50", "cache_25")
STEPS, DRY_STEPS = Steps(warm_up=64, timed=48, profiled=10), Steps(warm_up=3, timed=4, profiled=2)
SKIPPED = 16
"""First tokens of a run that are not timed: the cache of experts begins empty."""
MOST_TRIAL_RUNS = 9
TABLE_ROWS = 40


class Advance(LogitsProcessor):
    """Moves the trace on by a token, on the device; changes no score."""

    def __init__(self, routing: Any, filled: FilledCache) -> None:
        self._routing, self._filled = routing, filled
        filled.cache.__class__ = LentCache

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._routing.advance()
        return scores


class Clock(BaseStreamer):
    """When each token came, in seconds; the prompt is not one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._started = False

    def put(self, value: Tensor) -> None:
        if self._started:
            self.times.append(time.perf_counter())
        self._started = True

    def end(self) -> None:
        """Nothing is left."""


class LentCache(StaticCache):
    """A cache that nobody looks at after a run: `FilledCache` rewinds it before the next one.

    To `generate` it is as its own, so that a step too many need not be undone. Models with sliding
    windows could not undo it, and would run one step after the other, as no user's call does that
    leaves the cache to `generate`.
    """

    @property
    def _is_user_defined(self) -> bool:
        return False

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        """transformers says that the caller made it."""


class Generation:
    """`generate` of one compiled model, over and over from the same context."""

    def __init__(
        self, bench: Bench, compiled: Any, session: Any, routing: Any, filled: FilledCache
    ) -> None:
        """Tie the parts together."""
        self._bench, self._compiled, self.session = bench, compiled, session
        self._routing, self._filled = routing, filled
        filled.cache.__class__ = LentCache
        vocabulary = bench.shape.configured(bench.layers).vocab_size
        generator = torch.Generator().manual_seed(SEED)
        length = filled.context + 1
        self._prompt = torch.randint(2, vocabulary, (1, length), generator=generator)
        self._prompt = self._prompt.to(bench.device)
        self._last = vocabulary - 1

    def start(self, arm_name: str) -> None:
        """Begin an arm: slots empty, or all experts in their place."""
        arm = ARMS[arm_name]
        SlotLimit(self.session, self._bench.slots(arm)).empty()
        if arm.full:
            fill_slots(self.session)

    def run(self, count: int) -> tuple[list[int], list[float]]:
        """Generate `count` tokens; the tokens, and when each was there."""
        self._filled.rewind()
        self._routing.start(True)
        clock = Clock()
        out = self._compiled.generate(
            self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=self._last,
            pad_token_id=0,
            streamer=clock,
            logits_processor=LogitsProcessorList([Advance(self._routing, self._filled)]),
            **cache_argument(self._compiled, self._filled.cache),
        )
        return out[0, self._prompt.shape[1] :].tolist(), clock.times


def measure_cell(bench: Bench, run: Generation, name: str) -> dict[str, Any]:
    """One arm: trials, timed tokens, profiled tokens."""
    steps, arm = bench.steps, ARMS[name]
    run.session.engine.restart_trials()
    run.start(name)
    trials = 0
    while arm.tries and trials < MOST_TRIAL_RUNS and not run.session.engine.prefetch_found:
        run.run(steps.total)
        trials += 1
    run.start(name)
    run.run(steps.warm_up)  # fills the slots, and is not timed
    run.session.reset_stats()
    reset_generation_stats(run.session)
    skipped = min(SKIPPED, steps.warm_up)
    tokens, times = run.run(steps.warm_up + steps.timed)
    spans = [1e3 * (b - a) for a, b in zip(times[skipped:], times[skipped + 1 :], strict=False)]
    counted = run.session.stats.total
    generation = generation_stats(run.session)
    return {
        "wall_ms": {f"p{p}": quantile(spans, p / 100) for p in (20, 50, 80)},
        "tokens_timed": len(spans),
        "hit_rate": counted.hits / max(1, counted.hits + counted.misses),
        "missed_bytes_per_token": (counted.demand_bytes + counted.useful_speculative_bytes)
        / max(1, len(times)),
        "prefetch_records": run.session.engine.prefetch_records if arm.speculates else None,
        "trial_runs": trials,
        "generation": {
            "tokens": generation.tokens,
            "ahead": generation.ahead,
            "dropped": generation.dropped,
            "reason": generation.reason,
        },
        "tokens": tokens,
        **_profiled(bench, run),
    }


def _profiled(bench: Bench, run: Generation) -> dict[str, Any]:
    """Device time per token and kernel by kernel, of a run under the profiler."""
    if bench.device.type != "cuda":
        return {"device_ms": None, "kernels": []}
    from torch.profiler import ProfilerActivity, profile

    count = bench.steps.profiled + 2
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run.run(count)
        torch.cuda.synchronize()
    events = [
        {
            "name": event.name,
            "cat": "kernel",
            "ts": event.time_range.start,
            "dur": event.time_range.elapsed_us(),
        }
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    layers = bench.shape.configured(bench.layers).num_hidden_layers
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event["name"][:110], []).append(event["dur"])
    rows = [
        {
            "kernel": name,
            "per_token": len(spans) / count,
            "us_each": quantile(spans, 0.5),
            "us_per_layer": sum(spans) / count / layers,
            "ms_per_token": sum(spans) / count / 1e3,
        }
        for name, spans in by_name.items()
    ]
    rows.sort(key=lambda row: -float(row["ms_per_token"]))
    own = [event for event in events if not is_transfer(event)]
    return {
        "device_ms": covered_us(events) / count / 1e3,
        "device_without_transfers_ms": covered_us(own) / count / 1e3,
        "kernels": rows[:TABLE_ROWS],
    }


class Benchmark:
    """One call: what is asked for, what is there already, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._device = torch.device("cpu") if args.dry else torch.device("cuda", 0)
        self._steps = DRY_STEPS if args.dry else STEPS
        self._started = time.monotonic()
        fresh = {"schema": 1, **provenance(), "device": self._device_name(), "rows": {}}
        self.result: dict[str, Any] = fresh
        if args.out.exists():
            self.result = json.loads(args.out.read_text(encoding="utf-8"))

    def _device_name(self) -> str:
        return "CPU" if self._args.dry else torch.cuda.get_device_name(self._device)

    def _keep(self, key: str, row: dict[str, Any]) -> None:
        self.result["rows"][key] = {"commit": provenance()["commit"], **row}
        write_json(self._args.out, self.result)
        shown = {k: v for k, v in row.items() if k not in ("kernels", "tokens")}
        print(key, json.dumps(shown), flush=True)

    def run(self) -> None:
        """All phases asked for."""
        if "attention" in self._args.phases:
            for row in measure_attention(self._device, dry=self._args.dry):
                self._keep(f"attention|{row['shape']}|{row['length']}", row)
        if "cells" in self._args.phases:
            self._cells()

    def _cells(self) -> None:
        bench = self._bench()
        config = bench.shape.configured(bench.layers)
        experts, top_k = config.num_experts, config.num_experts_per_tok
        for context in self._args.contexts:
            for attention in self._args.attention:
                groups = sharing_groups(self._args.arms, "graph", experts=experts, top_k=top_k)
                for names in groups:
                    names = [n for n in names if self._key(context, attention, n) not in self._had]
                    if names and self._in_time(f"{names} at {context}"):
                        self._group(bench, context, attention, names)
        bench.store.give_back()

    @property
    def _had(self) -> dict[str, Any]:
        rows: dict[str, Any] = self.result["rows"]
        return rows

    def _key(self, context: int, attention: str, name: str) -> str:
        return f"{self._args.model}|{context}|{name}|attention {attention}"

    def _in_time(self, what: str) -> bool:
        if time.monotonic() - self._started < self._args.budget_s:
            return True
        print(f"left for another call: {what}", flush=True)
        return False

    def _bench(self) -> Bench:
        args, steps = self._args, self._steps
        shape = SHAPES[args.model]
        config = shape.configured(args.layers)
        trace = RoutingTrace.load(args.trace) if args.trace.exists() else None
        if trace is None:
            texts = texts_needed(
                config.num_hidden_layers,
                config.num_experts,
                reference_layers=8,
                reference_experts=32,
            )
            trace = record_reference(texts, steps.total)
            trace.save(args.trace)
        _, found = build_skeleton(shape, self._device, layers=args.layers)
        top_k = config.num_experts_per_tok
        tables = map_trace(trace, layers=len(found), experts=found[0].num_experts, top_k=top_k)
        store = RandomStore(found, top_k, self._device, std=config.initializer_range)
        bench = Bench(
            shape=shape,
            device=self._device,
            store=store,
            tables=tables.to(self._device),
            steps=steps,
            layers=args.layers,
        )
        learn_vectors(bench, 32 if args.dry else VECTOR_TOKENS)
        return bench

    @torch.no_grad()
    def _group(self, bench: Bench, context: int, attention: str, names: list[str]) -> None:
        """Arms that share a compiled graph."""
        free_memory(bench.device)
        options: dict[str, Any] = {
            **ARMS[names[0]].options,
            "strict": True,
            "attention": attention == "on",
            "transfer": "gather",
        }
        if not self._args.dry:
            options["mode"] = "reduce-overhead"
        slots = max(bench.slots(ARMS[name]) for name in names)
        with bench.opened(slots) as (model, session, routing), trace_predictions():
            filled = FilledCache(
                model.config, context, bench.steps.total, bench.device, bench.shape.dtype
            )
            compiled = torch.compile(model, backend="specmoe", options=options, fullgraph=True)
            run = Generation(bench, compiled, session, routing, filled)
            run.start(names[0])
            started = time.monotonic()
            run.run(4)
            print(f"compiled and captured in {time.monotonic() - started:.0f} s", flush=True)
            for name in names:
                row = measure_cell(bench, run, name)
                row["attended_context"] = context
                self._keep(self._key(context, attention, name), row)
                _print_kernels(row["kernels"])


def _print_kernels(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows[:18]:
        print(
            f"  {row['ms_per_token']:7.3f} ms/token {row['us_per_layer']:8.2f} us/layer"
            f" {row['per_token']:7.1f} x {row['us_each']:7.2f} us  {row['kernel'][:80]}"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser("gpu_token", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=["cells"])
    parser.add_argument("--model", choices=sorted(SHAPES))
    parser.add_argument("--contexts", nargs="+", type=int)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(CELL_ARMS[:3]))
    parser.add_argument("--attention", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model's own")
    parser.add_argument("--trace", type=Path, help="routing trace; recorded and written if absent")
    parser.add_argument("--budget-s", type=float, default=480.0, help="begin nothing after this")
    args = parser.parse_args(arguments)
    args.model = args.model or (DRY_SHAPES[0] if args.dry else "Qwen3-30B-A3B")
    args.contexts = args.contexts or ([32] if args.dry else [1024, 65536])
    args.trace = args.trace or args.out.with_suffix(".trace.safetensors")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parse(arguments)
    if not args.dry and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none; run --dry", file=sys.stderr)
        return 2
    try:
        Benchmark(args).run()
    except USER_ERRORS as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0
