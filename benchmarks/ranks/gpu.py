"""Several GPUs beside one: experts split over ranks on real links, time per token of `generate`.

    python -m benchmarks ranks_gpu --out ranks.json
    python -m benchmarks ranks_gpu --out ranks.json --shapes GPT-OSS-20B-mxfp4 --contexts 65536
    python -m benchmarks ranks_gpu --out ranks.json --sums all_reduce one_shot
    python -m benchmarks ranks_gpu --out dry.json --dry

Phases: `check` (tokens in float32 equal to one GPU's), `link` (rates of all links at once, and the
time of a sum over the ranks), `sums` (such a sum inside a CUDA graph, in each way there is),
`cells` (random weights of full shape, routing of a trace, a context that is there already; slots of
25 and 50 % of all experts on each rank; in each way of `--sums`). In the cells one rank and
N ranks of every shape, each group in processes of its own, prepare beside each other; then one at a
time measures, one rank and N in turns, while the others wait. Host memory must hold twice the
experts of all shapes. Shapes that do not fit the GPUs together are calls of their own, beside each
other with one file of `--beside`; the one rank runs on the first GPU that a call sees. Rows are
kept one by one, and an existing file is gone on with. `--layers` takes fewer layers than the model
has: times are of those.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.full_size.arms import ARMS
from benchmarks.full_size.model import SHAPES
from benchmarks.full_size.token import DRY_STEPS, STEPS
from benchmarks.full_size.trace import RoutingTrace, record_reference, texts_needed
from benchmarks.kit.claims import Claim
from benchmarks.kit.command import explains_errors, run_parser
from benchmarks.kit.turns import preparing, turn
from benchmarks.ranks.gpu_page import CELL_ARMS, CONTEXTS, WAYS, gpu_page, ranks_key
from benchmarks.ranks.groups import Group, run_group
from specmoe_compile.bench.machine import provenance
from specmoe_compile.system.output import write_json

SCHEMA = 1
WORKER = "benchmarks.ranks.gpu_worker"
PHASES = ("check", "link", "sums", "cells")
FULL = ("Qwen3-30B-A3B", "Qwen3-30B-A3B-int4", "GPT-OSS-20B-mxfp4")
DRY = ("tiny-qwen3",)
STAGES = ("caches", "resident")
"""Arms with slots for all experts of a rank have sessions and graphs of another kind."""
MOST, NEVER_ABOVE = 0.6, 1.05
MISSES_DECIDE = 0.5
"""Share of a token's time at one rank that misses must take for the first bound to be asked."""


class Benchmark:
    """One call: what is asked for, what is there already, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._started = time.monotonic()
        self.failed: list[str] = []
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            **provenance(),
            "ranks": args.ranks,
            "layers": args.layers,
            "rows": {},
        }
        if args.out.exists():
            self.result = json.loads(args.out.read_text(encoding="utf-8"))

    def run(self) -> None:
        """All phases asked for, in turns of one rank and N."""
        with TemporaryDirectory(prefix="specmoe-ranks-") as name:
            folder = Path(name)
            for phase in self._args.phases:
                if phase == "cells":
                    self._cells(folder)
                    continue
                for ranks in (1, self._args.ranks):
                    self._one(phase, ranks, folder)

    def _one(self, phase: str, ranks: int, folder: Path) -> None:
        """A phase that is one job from start to end."""
        key = f"{phase}|{ranks} ranks"
        if self._had_or_late(key):
            return
        began_s = time.monotonic()
        job = {"phase": phase, "dry": self._args.dry, "out": str(folder / "out.json")}
        job |= {"layers": self._args.layers, "shape": self._args.shapes[0]}
        job |= {"sums": self._ways(ranks)}
        if phase == "check":
            job |= {"checkpoint": str(folder / "checkpoint"), "store_dir": str(folder / "store")}
            if not (folder / "checkpoint").exists():
                save_small(folder / "checkpoint")
        with turn(self._args.beside):
            found = run_group(job, ranks, folder, WORKER)
        self._keep(key, {"seconds": time.monotonic() - began_s, **found})

    def _cells(self, folder: Path) -> None:
        """Every shape on one rank and on N, prepared beside each other and measured in turns."""
        args = self._args
        job = {"phase": "cells", "dry": args.dry, "layers": args.layers, "arms": list(args.arms)}
        job |= {"trace": str(self._trace())}
        with contextlib.ExitStack() as opened:
            groups: dict[tuple[str, int], Group] = {}
            with preparing(args.beside):
                for number, shape in enumerate(args.shapes):
                    for ranks in (1, args.ranks):
                        # The first shape is the largest, and its one rank has a GPU to itself.
                        gpu = min(number, args.ranks - 1) if ranks == 1 and not args.dry else None
                        own = {**job, "shape": shape, "sums": self._ways(ranks)}
                        group = Group(WORKER, own, ranks, folder, name=shape, gpu=gpu)
                        opened.callback(group.close)
                        groups[shape, ranks] = group
                resident = self._all(groups, "opened", lambda group: group.answer()["resident"])
            for context, stage in itertools.product(args.contexts, STAGES):
                with preparing(args.beside):
                    for group in groups.values():
                        group.ask({"context": context, "stage": stage})
                    self._all(groups, f"{context}, {stage}", lambda group: group.answer())
                with turn(args.beside):
                    for number in range(args.turns):
                        self._measure(groups, resident, context, stage, number)

    def _measure(
        self,
        groups: Mapping[tuple[str, int], Group],
        resident: Mapping[tuple[str, int], Sequence[str]],
        context: int,
        stage: str,
        number: int,
    ) -> None:
        """Every arm of a stage once, one rank and N after each other, these in each way of sums."""
        for shape, name in itertools.product(self._args.shapes, self._args.arms):
            for ranks in (1, self._args.ranks):
                group = groups.get((shape, ranks))
                if group is None or (name in resident[shape, ranks]) != (stage == "resident"):
                    continue
                for sums in self._ways(ranks):
                    key = f"{shape}|{context}|turn {number + 1}|{name}|{ranks_key(ranks, sums)}"
                    if not self._had_or_late(key):
                        self._keep(key, group.turn({"arm": name, "sums": sums, "turn": number}))

    def _ways(self, ranks: int) -> list[str]:
        """Ways of sums over so many ranks; one rank has nothing to add up."""
        return list(self._args.sums) if ranks > 1 else ["all_reduce"]

    def _all(
        self,
        groups: dict[tuple[str, int], Group],
        what: str,
        do: Callable[[Group], Any],
    ) -> dict[tuple[str, int], Any]:
        """Wait for all groups; one that failed is told of and left out, with its shape."""
        found = {}
        for shape, ranks in list(groups):
            if (shape, ranks) not in groups:
                continue
            try:
                found[shape, ranks] = do(groups[shape, ranks])
                print(f"{what}: {shape}, {ranks} ranks: {self._elapsed():.0f} s", flush=True)
            except RuntimeError as error:
                print(f"{shape} is left out: {error}", flush=True)
                self.failed.append(f"{shape}, {ranks} ranks")
                for other in (1, self._args.ranks):
                    if (group := groups.pop((shape, other), None)) is not None:
                        group.close()
        return found

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _had_or_late(self, key: str) -> bool:
        if key in self.result["rows"]:
            return True
        if self._elapsed() < self._args.budget_s:
            return False
        print(f"left for another call: {key}", flush=True)
        return True

    def _keep(self, key: str, row: Mapping[str, Any]) -> None:
        origin = {"commit": provenance()["commit"], "lease": self._args.lease}
        self.result["rows"][key] = {**origin, **row}
        write_json(self._args.out, self.result)
        wall = f" {row['wall_ms']}" if "wall_ms" in row else ""
        print(f"{key}{wall}: {self._elapsed():.0f} s", flush=True)

    def _trace(self) -> Path:
        """The routing trace, recorded from the reference model where it is not there yet."""
        path: Path = self._args.trace
        if not path.exists():
            configs = [SHAPES[name].configured(self._args.layers) for name in self._args.shapes]
            texts = max(
                texts_needed(
                    config.num_hidden_layers,
                    getattr(config, "num_experts", None) or config.num_local_experts,
                    reference_layers=8,
                    reference_experts=32,
                )
                for config in configs
            )
            steps = DRY_STEPS if self._args.dry else STEPS
            trace: RoutingTrace = record_reference(texts, steps.total)
            trace.save(path)
        return path


def save_small(folder: Path) -> None:
    """A small model in float32 with experts enough to miss."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    shape: dict[str, Any] = {"head_dim": 16}
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        **shape,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def claims(result: Mapping[str, Any]) -> list[Claim]:
    """What must hold of the rows that are there."""
    rows, ranks = result["rows"], result["ranks"]
    found = []
    one, several = rows.get("check|1 ranks"), rows.get(f"check|{ranks} ranks")
    if one and several:
        same = one["tokens"] == several["tokens"]
        found.append(
            Claim(text=f"float32 tokens of {ranks} ranks are one's", measured=str(same), holds=same)
        )
    cases = dict.fromkeys(key.rpartition("|")[0] for key in rows)
    for case, sums in itertools.product(cases, WAYS):
        alone, other = rows.get(f"{case}|1 ranks"), rows.get(f"{case}|{ranks_key(ranks, sums)}")
        if not (alone and other and "wall_ms" in alone):
            continue
        how = "" if sums == "all_reduce" else ", sums in one shot"
        setting, _, name = case.rpartition("|")
        share = _median(other) / _median(alone)
        resident = rows.get(f"{setting}|resident|1 ranks")
        decides = bool(resident) and _median(resident) < (1 - MISSES_DECIDE) * _median(alone)
        bound = MOST if decides else NEVER_ABOVE
        found.append(
            Claim(
                text=f"{setting}, {name}{how}: {ranks} ranks take at most {bound} x one's time",
                measured=f"{share:.3f}",
                holds=share <= bound,
            )
        )
    return found


def _median(row: Mapping[str, Any]) -> float:
    value: float = row["wall_ms"]["p50"]
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser("ranks_gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU, with gloo")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--contexts", nargs="+", type=int)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(CELL_ARMS))
    parser.add_argument("--sums", nargs="+", choices=WAYS, default=["all_reduce"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model's own")
    parser.add_argument("--turns", type=int, default=2, help="A B A B ...")
    parser.add_argument("--trace", type=Path, help="routing trace; recorded if absent")
    parser.add_argument("--lease", type=int, default=1, help="kept in the rows of this call")
    parser.add_argument("--beside", type=Path, help="file that calls beside this one name, too")
    parser.add_argument("--page", type=Path, help="Markdown of the result")
    parser.add_argument("--budget-s", type=float, default=420.0, help="begin nothing after this")
    args = parser.parse_args(argv)
    args.shapes = args.shapes or list(DRY if args.dry else FULL)
    args.contexts = args.contexts or ([32] if args.dry else list(CONTEXTS))
    args.trace = args.trace or args.out.with_suffix(".trace.safetensors")
    if args.dry:
        args.turns = 1
    return args


@explains_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a claim does not hold."""
    args = parse(argv)
    found = 0 if args.dry else torch.cuda.device_count()
    if not args.dry and found < args.ranks:
        raise ValueError(f"{args.ranks} GPUs are needed and {found} found; give --ranks or --dry.")
    benchmark = Benchmark(args)
    benchmark.run()
    # A tiny model on a CPU says nothing of times.
    held = [each for each in claims(benchmark.result) if not args.dry or "tokens" in each.text]
    if args.page is not None:
        args.page.write_text(gpu_page(args.out.name, benchmark.result, held), encoding="utf-8")
    for claim in held:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}: {claim.measured}")
    return 0 if all(claim.holds for claim in held) and not benchmark.failed else 1
