"""A token through `generate` on a GPU at full size: wall time, device time, and kernel by kernel.

    python -m benchmarks gpu_token --out token.json --phases attention
    python -m benchmarks gpu_token --out token.json --contexts 1024
    python -m benchmarks gpu_token --out token.json --contexts 65536 --arms resident
    python -m benchmarks gpu_token --out dry.json --dry

Phase `attention` compares the decode attention of one layer with PyTorch's, without a model. Phase
`cells` builds the full model (random weights, routing of a trace, a context that is there already),
and runs `model.generate` on it: greedy, with a streamer and a token that ends the text, so that
each token is read. Rows are kept per arm, context and attention, and an existing file is gone on
with. What a row holds: `generation.py`. Phase `first_token` times prompts on the same records,
see `first_token.py`; beside other processes, give all of them one file of `--turns`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.full_size.arms import (
    ARMS,
    Bench,
    Steps,
    free_memory,
    learn_vectors,
    sharing_groups,
)
from benchmarks.full_size.attention import measure_attention
from benchmarks.full_size.first_token import REPEATS, measure_prompts
from benchmarks.full_size.generation import Generation, measure_cell
from benchmarks.full_size.memory import other_bytes
from benchmarks.full_size.model import (
    DRY_SHAPES,
    SHAPES,
    FilledCache,
    RandomStore,
    build_skeleton,
)
from benchmarks.full_size.routing import trace_predictions
from benchmarks.full_size.run import VECTOR_TOKENS
from benchmarks.full_size.trace import (
    RoutingTrace,
    map_trace,
    near_uniform_tables,
    record_reference,
    texts_needed,
)
from benchmarks.kit.command import run_parser
from benchmarks.kit.turns import preparing, turn
from specmoe_compile.bench.machine import provenance
from specmoe_compile.system.output import USER_ERRORS, sentence, write_json

PHASES = ("attention", "first_token", "cells")
CELL_ARMS = ("resident", "specmoe_50", "specmoe_25", "cache_50", "cache_25")
STEPS, DRY_STEPS = Steps(warm_up=64, timed=48, profiled=10), Steps(warm_up=3, timed=4, profiled=2)


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
        if {"first_token", "cells"} & set(self._args.phases):
            with preparing(self._args.turns):
                bench = self._bench()
            if "first_token" in self._args.phases:
                self._first_tokens(bench)
            if "cells" in self._args.phases:
                self._cells(bench)
            with preparing(self._args.turns):
                bench.store.give_back()

    def _first_tokens(self, bench: Bench) -> None:
        """A prompt of each context, cold, and then again and again."""
        for context in self._args.prompts or self._args.contexts:
            key = f"first_token|{self._args.model}|{context}"
            if key not in self._had and self._in_time(key):
                arm, start = self._args.first_arm, not self._args.no_start
                with turn(self._args.turns):
                    try:
                        row = measure_prompts(
                            bench, context, arm, repeats=self._args.repeats, start=start
                        )
                    except USER_ERRORS as error:  # too long a prompt does not end the run
                        row = {"arm": arm, "not_run": sentence(error)}
                self._keep(key, row)

    def _cells(self, bench: Bench) -> None:
        config = bench.shape.configured(bench.layers)
        experts, top_k = config.num_experts, config.num_experts_per_tok
        for context in self._args.contexts:
            arms = self._with_room(bench, context)
            for attention in self._args.attention:
                sizes = {"experts": experts, "top_k": top_k}
                groups = sharing_groups(arms, "graph", **sizes, slots_of=bench.slots)
                for names in groups:
                    names = [n for n in names if self._key(context, attention, n) not in self._had]
                    if names and self._in_time(f"{names} at {context}"):
                        self._group(bench, context, attention, names)

    def _with_room(self, bench: Bench, context: int) -> list[str]:
        """The arms that fit in their memory; a row says why another does not."""
        arms: list[str] = self._args.arms
        if all(ARMS[name].memory_bytes is None for name in arms):
            return arms
        largest = max(layer.total_bytes for layer in bench.store.layers)
        bench.other_bytes = other_bytes(bench.shape, context, largest, layers=bench.layers)
        fitting = []
        for name in arms:
            try:
                bench.slots(ARMS[name])
                fitting.append(name)
            except ValueError as error:
                for attention in self._args.attention:
                    key = self._key(context, attention, name)
                    self._keep(key, {"attended_context": context, "not_run": sentence(error)})
        return fitting

    @property
    def _had(self) -> dict[str, Any]:
        rows: dict[str, Any] = self.result["rows"]
        return rows

    def _key(self, context: int, attention: str, name: str) -> str:
        products = "|no products" if self._args.no_products else ""
        products += "|no shared layers" if self._args.no_shared_layers else ""
        routing = "" if self._args.routing == "trace" else f"|{self._args.routing}"
        return f"{self._args.model}|{context}|{name}|attention {attention}{products}{routing}"

    def _in_time(self, what: str) -> bool:
        if time.monotonic() - self._started < self._args.budget_s:
            return True
        print(f"left for another call: {what}", flush=True)
        return False

    def _bench(self) -> Bench:
        args, steps = self._args, self._steps
        shape = SHAPES[args.model]
        config = shape.configured(args.layers)
        _, found = build_skeleton(shape, self._device, layers=args.layers)
        top_k = config.num_experts_per_tok
        tables = self._tables(len(found), found[0].num_experts, top_k)
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

    def _tables(self, layers: int, experts: int, top_k: int) -> Tensor:
        """What the routers choose: [L, N, 2, E]. A trace is recorded if its file is not there."""
        path, tokens = self._args.trace, self._steps.total
        if self._args.routing == "uniform":
            return near_uniform_tables(layers, tokens, experts, top_k)
        if not path.exists():
            texts = texts_needed(layers, experts, reference_layers=8, reference_experts=32)
            record_reference(texts, tokens).save(path)
        return map_trace(RoutingTrace.load(path), layers=layers, experts=experts, top_k=top_k)

    @torch.no_grad()
    def _group(self, bench: Bench, context: int, attention: str, names: list[str]) -> None:
        """Arms that share a compiled graph."""
        free_memory(bench.device)
        options: dict[str, Any] = {
            **ARMS[names[0]].graph_options(bench.store.layouts[0].record_bytes),
            "strict": True,
            "attention": attention == "on",
            "transfer": "gather",
            "products": False if self._args.no_products else "auto",
            "share_layers": False if self._args.no_shared_layers else "auto",
        }
        if not self._args.dry:
            options["mode"] = "reduce-overhead"
        slots = max(bench.slots(ARMS[name]) for name in names)
        turns = self._args.turns
        with ExitStack() as held:
            with preparing(turns):
                started = time.monotonic()
                model, session, routing = held.enter_context(
                    bench.opened(slots, cache_policy=ARMS[names[0]].cache_policy)
                )
                held.enter_context(trace_predictions())
                filled = FilledCache(
                    model.config, context, bench.steps.total, bench.device, bench.shape.dtype
                )
                compiled = torch.compile(model, backend="specmoe", options=options, fullgraph=True)
                run = Generation(bench, compiled, session, routing, filled)
                run.start(names[0])
                run.run(4)
                seconds = time.monotonic() - started
                print(f"compiled and captured in {seconds:.0f} s", flush=True)
            for name in names:
                with turn(turns):
                    row = measure_cell(bench, run, name)
                row |= {"attended_context": context, "routing": self._args.routing}
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
    parser.add_argument("--no-products", action="store_true", help="option products=False")
    parser.add_argument("--no-shared-layers", action="store_true", help="option share_layers=False")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's own")
    parser.add_argument("--routing", choices=("trace", "uniform"), default="trace")
    parser.add_argument("--trace", type=Path, help="routing trace; recorded and written if absent")
    parser.add_argument("--prompts", nargs="+", type=int, help="of first_token, not --contexts")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each prompt")
    parser.add_argument("--no-start", action="store_true", help="time no start, only first tokens")
    parser.add_argument("--first-arm", choices=list(ARMS), default="cache_25", help="its cache")
    parser.add_argument(
        "--turns", type=Path, help="file that all processes name which measure beside this one"
    )
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
