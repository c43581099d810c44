"""Decode on a GPU at full model size, against the paper's setting.

    python -m benchmarks gpu_full_size --out full.json --only trace        # needs no GPU
    python -m benchmarks gpu_full_size --out full.json --resume            # ten minutes of it
    python -m benchmarks gpu_full_size --out full.json --resume            # the next ten
    python -m benchmarks gpu_full_size --out full.json --resume --only arms \\
        --pieces 4096:graph:trace,router:specmoe_10                        # some rows only
    python -m benchmarks gpu_full_size --out dry.json --dry                # tiny, on the CPU

Phases: `trace` (records the routing that drives the routers), `check` (tokens against the
unmodified model, a few layers in float32), `arms`, `accelerate`, `report` (Markdown beside the JSON
file). The JSON file is written after each arm; a call ends by itself before its time is over and
says what is left. What is measured and how: docs/results/log/full_size.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size.arms import (
    ARMS,
    MODES,
    ROUTINGS,
    Bench,
    Steps,
    learn_vectors,
)
from benchmarks.full_size.extra import (
    CHECKED_ARMS,
    check_tokens,
    measure_accelerate,
    measure_link,
)
from benchmarks.full_size.measure import measure_arms
from benchmarks.full_size.model import (
    DRY_SHAPES,
    SEED,
    SHAPES,
    RandomStore,
    Shape,
    build_skeleton,
)
from benchmarks.full_size.pieces import Piece, grouped, pieces_of
from benchmarks.full_size.profile import draw_layer, one_layer, read_trace
from benchmarks.full_size.report import row_key, write_markdown
from benchmarks.full_size.trace import (
    RoutingTrace,
    describe_tables,
    map_trace,
    record_reference,
    texts_needed,
)
from benchmarks.kit.command import run_parser
from benchmarks.kit.turns import turn
from specmoe_compile.bench.machine import provenance
from specmoe_compile.system.output import USER_ERRORS, sentence, write_json

PHASES = ("trace", "check", "arms", "accelerate", "report")
CONTEXTS = (1024, 65536, 4096, 16384)  # in order of what the goals ask for
STEPS = Steps(warm_up=64, timed=48, profiled=10)
CHECK_STEPS = Steps(warm_up=4, timed=12, profiled=2)
CHECK_LAYERS, CHECK_CONTEXT = 4, 512
DRY_STEPS, DRY_CONTEXTS = Steps(warm_up=3, timed=4, profiled=2), (32,)
TRACED_ARMS = ("on_demand", "prefetch_no_cache", "specmoe_25")
VECTOR_TOKENS = 512


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser("gpu_full_size", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out holds")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES[:2]))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--contexts", nargs="+", type=int)
    parser.add_argument(
        "--pieces",
        nargs="+",
        type=Piece.parse,
        metavar="CONTEXT:MODE:ROUTINGS:ARMS",
        help="in this order, instead of --contexts, --modes, --routings and --arms",
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the model's own")
    parser.add_argument("--trace", type=Path, help="routing trace; recorded and written if absent")
    parser.add_argument(
        "--budget-s", type=float, default=560.0, help="end before this many seconds"
    )
    parser.add_argument(
        "--turns", type=Path, help="file that all processes name which measure beside this one"
    )
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    args = parser.parse_args(arguments)
    args.models = args.models or (list(DRY_SHAPES) if args.dry else ["Qwen3-30B-A3B"])
    args.contexts = args.contexts or list(DRY_CONTEXTS if args.dry else CONTEXTS)
    args.trace = args.trace or args.out.with_suffix(".trace.safetensors")
    return args


class Benchmark:
    """One call: what is asked for, what is there already, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu") if args.dry else torch.device("cuda", 0)
        self.steps = DRY_STEPS if args.dry else STEPS
        self.started = time.monotonic()
        self.longest_s = 0.0
        self.left: list[str] = []
        self.result = self._begun()

    def _begun(self) -> dict[str, Any]:
        """The result file so far; raises `ValueError` if it is another run's."""
        args = self.args
        fresh = {
            "schema": 1,
            "dry": args.dry,
            **provenance(),
            "device": self._device_name(),
            "seed": SEED,
            "models": {},
            "rows": {},
            "checks": [],
        }
        if not args.out.exists():
            return fresh
        if not args.resume:
            raise ValueError(
                f"{args.out} exists: give --resume to go on with it, or another --out."
            )
        found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
        for name in ("schema", "dry", "commit", "device", "versions", "seed"):
            if found.get(name) != fresh[name]:
                raise ValueError(
                    f"{args.out} was measured with another {name} ({found.get(name)!r}, now"
                    f" {fresh[name]!r}): give another --out."
                )
        return found

    def _device_name(self) -> str:
        if self.args.dry or not torch.cuda.is_available():
            return "CPU"
        return torch.cuda.get_device_name(self.device)

    def save(self) -> None:
        write_json(self.args.out, self.result)

    def in_time(self, what: str) -> bool:
        """Whether another piece of work fits; if not, `what` is noted as left."""
        if time.monotonic() - self.started + self.longest_s <= self.args.budget_s:
            return True
        self.left.append(what)
        return False

    def timed(self, started: float) -> None:
        self.longest_s = max(self.longest_s, time.monotonic() - started)

    def trace(self) -> RoutingTrace:
        """The reference model's trace: from its file, or recorded now."""
        if self.args.trace.exists():
            return RoutingTrace.load(self.args.trace)
        texts = max(
            texts_needed(
                config.num_hidden_layers,
                config.num_experts,
                reference_layers=8,
                reference_experts=32,
            )
            for config in (SHAPES[name].configured(self.args.layers) for name in self.args.models)
        )
        trace = record_reference(texts, self.steps.total)
        trace.save(self.args.trace)
        return trace

    def bench(self, shape: Shape, steps: Steps, trace: RoutingTrace, layers: int | None) -> Bench:
        """Records, mapped trace and default vectors of one model."""
        _, found = build_skeleton(shape, self.device, layers=layers)
        top_k = shape.configured().num_experts_per_tok
        tables = map_trace(trace, layers=len(found), experts=found[0].num_experts, top_k=top_k)
        if tables.shape[1] < steps.total:
            raise ValueError(
                f"{self.args.trace} holds {tables.shape[1]} tokens and a run takes {steps.total}:"
                " remove it, and it is recorded anew."
            )
        std = shape.configured().initializer_range
        store = RandomStore(found, top_k, self.device, std=std)
        bench = Bench(
            shape=shape,
            device=self.device,
            store=store,
            tables=tables.to(self.device),
            steps=steps,
            lowering=self.args.lowering,
            layers=layers,
            turns=self.args.turns,
        )
        learn_vectors(bench, 32 if self.args.dry else VECTOR_TOKENS)
        return bench

    def check(self, name: str, trace: RoutingTrace) -> None:
        """Phase `check` of one model."""
        if any(row["model"] == name for row in self.result["checks"]) or not self.in_time(
            f"check of {name}"
        ):
            return
        dry = self.args.dry
        shape = replace(SHAPES[name], dtype=torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = False
        layers = None if dry else min(CHECK_LAYERS, shape.configured().num_hidden_layers)
        steps = self.steps if dry else CHECK_STEPS
        bench = self.bench(shape, steps, trace, layers)
        rows = check_tokens(
            bench,
            self.args.contexts[0] if dry else CHECK_CONTEXT,
            arms=[arm for arm in CHECKED_ARMS if arm in self.args.arms],
            modes=self.args.modes,
        )
        bench.store.give_back()
        for row in rows:
            self.result["checks"].append({"model": name, **row})
            print(json.dumps(row), flush=True)
        self.save()

    def arms(self, name: str, trace: RoutingTrace) -> None:
        """Phase `arms` of one model."""
        config = SHAPES[name].configured(self.args.layers)
        args = self.args
        pieces = args.pieces or pieces_of(args.contexts, args.modes, args.routings, args.arms)
        todo = [
            part
            for piece in pieces
            for part in grouped(
                piece.without(lambda *place: self._has(name, *place)),
                experts=config.num_experts,
                top_k=config.num_experts_per_tok,
            )
        ]
        if not todo or not self.in_time(f"{len(todo)} groups of arms of {name}"):
            return
        bench = self.bench(SHAPES[name], self.steps, trace, self.args.layers)
        top_k = bench.store.top_k
        with turn(args.turns):
            link = measure_link(bench)
        self.result["models"][name] = {
            "layers": len(bench.store.layers),
            "layers_of_model": SHAPES[name].configured().num_hidden_layers,
            "experts": bench.store.num_experts[0],
            "top_k": top_k,
            "dtype": str(SHAPES[name].dtype),
            "record_bytes": bench.store.layouts[0].record_bytes,
            "store_bytes": bench.store.total_bytes,
            "trace": {**describe_tables(bench.tables.cpu(), top_k), "digest": trace.digest},
            "link": link,
        }
        print(json.dumps(self.result["models"][name]), flush=True)
        for piece in todo:
            if self.in_time(f"{name}, {piece}"):
                self._group(bench, name, piece)
        bench.store.give_back()

    def _has(self, *place: Any) -> bool:
        return "|".join(str(part) for part in place) in self.result["rows"]

    def _group(self, bench: Bench, name: str, piece: Piece) -> None:
        started = time.monotonic()
        context, mode = piece.context, piece.mode

        def trace_file(arm: str, routing: str) -> Path | None:
            wanted = arm in TRACED_ARMS and routing == "trace" and context == self.args.contexts[0]
            return self.args.out.with_suffix(f".{name}.{arm}.{mode}.json.gz") if wanted else None

        for rows in measure_arms(
            bench, piece.arms, mode, context, piece.routings, trace_file=trace_file
        ):
            for row in rows.values():
                self.result["rows"][row_key(name, row)] = row
                print(json.dumps({k: v for k, v in row.items() if k != "tokens"}), flush=True)
            self.save()
            arm = next(iter(rows.values()))["arm"]
            kept = trace_file(arm, "trace")
            if kept is not None and kept.exists():
                self._draw(bench, kept, f"{name}, {arm}, {mode}, {context} tokens: one layer")
        self.timed(started)

    def _draw(self, bench: Bench, kept: Path, title: str) -> None:
        events = one_layer(read_trace(kept), len(bench.store.layers), bench.steps.profiled)
        try:
            draw_layer(events, kept.with_suffix("").with_suffix(".png"), title)
        except ValueError as error:
            print(f"no picture of {kept.name}: {error}", file=sys.stderr)

    def accelerate(self, name: str) -> None:
        """Phase `accelerate` of one model: a row per context."""
        for context in self.args.contexts:
            if self._has(name, context, "trace", "accelerate", "eager") or not self.in_time(
                f"{name}, {context} tokens, accelerate"
            ):
                continue
            started = time.monotonic()
            with turn(self.args.turns):
                row = measure_accelerate(
                    SHAPES[name],
                    self.device,
                    context,
                    layers=SHAPES[name].configured(self.args.layers).num_hidden_layers,
                    warm_up=2,
                    timed=2 if self.args.dry else 10,
                )
            # All experts of a layer move whatever the routing is.
            row["routing"] = "trace"
            self.result["rows"][row_key(name, row)] = row
            print(json.dumps(row), flush=True)
            self.save()
            self.timed(started)

    def run(self) -> None:
        """All phases asked for."""
        phases = set(self.args.only)
        if phases & {"trace", "check", "arms"}:
            trace = self.trace()
            for name in self.args.models:
                if "check" in phases:
                    self.check(name, trace)
                if "arms" in phases:
                    self.arms(name, trace)
        if "accelerate" in phases:
            for name in self.args.models:
                self.accelerate(name)
        if phases == {"trace"}:
            return
        self.save()
        if "report" in phases:
            path = self.args.out.with_suffix(".md")
            path.write_text(write_markdown(self.result), encoding="utf-8")
            print(path.read_text(encoding="utf-8"))
        if self.left:
            print(f"left for another call with --resume: {'; '.join(self.left)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parse(arguments)
    if not args.dry and not torch.cuda.is_available() and args.only != ["trace"]:
        print("this benchmark needs a CUDA device and found none; run --dry", file=sys.stderr)
        return 2
    try:
        Benchmark(args).run()
    except USER_ERRORS as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0
