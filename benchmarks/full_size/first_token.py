"""The first token of a prompt on a GPU at full size, through `generate`.

    python -m benchmarks gpu_first_token --out first.json --models Qwen3-30B-A3B-nvfp4
    python -m benchmarks gpu_first_token --out dry.json --dry

The model has random weights and its own routers; nearly all experts of each layer are used, and
all of them cross the link. The first call compiles, and the time to each of its first tokens is
kept: in a second process, which finds the compiled code of the first one, it is a second start. The
other calls are timed, wall clock. Beside it stands what the experts' bytes take at the rate of a
large copy, which no first token of a model whose experts are not on the GPU can go below.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.full_size.arms import ARMS, Bench, Steps, cuda_engine
from benchmarks.full_size.clock import Clock
from benchmarks.full_size.extra import measure_link
from benchmarks.full_size.model import SHAPES, RandomStore, build_skeleton, random_tokens
from benchmarks.kit.command import run_parser
from specmoe_compile.bench.machine import provenance
from specmoe_compile.system.output import USER_ERRORS, sentence, write_json

REPEATS = 4
START_TOKENS = 3
"""Of the first call, whose time to each token is kept: what a user waits for at the start."""
TIMED_PARTS = 24
_STEPS = Steps(warm_up=1, timed=1, profiled=1)


@torch.no_grad()
def measure_first_token(
    name: str,
    device: torch.device,
    *,
    context: int,
    arm: str,
    layers: int | None,
    repeats: int,
    share_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """A model of its own for `measure_prompts`."""
    shape = SHAPES[name]
    _, found = build_skeleton(shape, device, layers=layers)
    config = shape.configured(layers)
    top_k = config.num_experts_per_tok
    store = RandomStore(found, top_k, device, std=config.initializer_range)
    tables = torch.zeros(len(found), 1, 2, found[0].num_experts, device=device)
    bench = Bench(
        shape=shape, device=device, store=store, tables=tables, steps=_STEPS, layers=layers
    )
    row = measure_prompts(bench, context, arm, repeats=repeats, share_layers=share_layers)
    store.give_back()
    return row


@torch.no_grad()
def measure_prompts(
    bench: Bench,
    context: int,
    arm: str,
    *,
    repeats: int = REPEATS,
    start: bool = True,
    share_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """Seconds until the first token of a prompt of `context` tokens; slots empty each time.

    The first call generates a few tokens, and what it compiles and captures is in its times;
    without `start` it generates one, which compiles no decode step, and its time is not kept.
    """
    device, store = bench.device, bench.store
    link = measure_link(bench)["copy_gbps"]
    options = ARMS[arm].graph_options(store.layouts[0].record_bytes)
    options |= {"strict": True, "share_layers": share_layers}
    if device.type == "cuda":
        options["mode"] = "reduce-overhead"
    with bench.opened(bench.slots(ARMS[arm])) as (model, session, routing):
        routing.start(False)
        prompt = random_tokens(model.config.vocab_size, context, device)
        _wait(device)
        began = time.perf_counter()
        compiled: Any = torch.compile(model, backend="specmoe", options=options)

        def generate(count: int) -> list[float]:
            """Seconds of each token since the call."""
            cuda_engine(session).forget_slots()
            _wait(device)
            clock, started = Clock(), time.perf_counter()
            compiled.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
                streamer=clock,
            )
            _wait(device)
            return [moment - started for moment in clock.times]

        torch._dynamo.utils.compilation_time_metrics.clear()
        ahead = time.perf_counter() - began
        cold = [ahead + moment for moment in generate(START_TOKENS if start else 1)]
        spent = torch._dynamo.utils.compilation_time_metrics
        parts = {name: sum(seconds) for name, seconds in spent.items()}
        times = [generate(1)[0] for _ in range(repeats)]
    longest = sorted(parts, key=lambda name: -parts[name])[:TIMED_PARTS]
    return {
        "model": bench.shape.name,
        "context": context,
        "layers": len(store.layers),
        "arm": arm,
        "share_layers": share_layers,
        "start_s": cold if start else None,
        "compile_s": {name: parts[name] for name in longest} if start else None,
        "first_token_s": statistics.median(times),
        "all_s": times,
        "store_bytes": store.total_bytes,
        "copy_gbps": link,
        "link_s": store.total_bytes / link / 1e9,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print rows; returns the exit status."""
    parser = run_parser("gpu_first_token", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--arm", choices=list(ARMS), default="cache_25")
    parser.add_argument("--no-shared-layers", action="store_true", help="option share_layers=False")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's own")
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none; run --dry", file=sys.stderr)
        return 2
    device = torch.device("cpu") if args.dry else torch.device("cuda", 0)
    models = args.models or ["tiny-qwen3-nvfp4" if args.dry else "Qwen3-30B-A3B-nvfp4"]
    result: dict[str, Any] = {"schema": 1, **provenance(), "dry": args.dry, "rows": []}
    try:
        for name in models:
            row = measure_first_token(
                name,
                device,
                context=40 if args.dry else args.context,
                arm=args.arm,
                layers=args.layers,
                repeats=1 if args.dry else REPEATS,
                share_layers=False if args.no_shared_layers else "auto",
            )
            result["rows"].append(row)
            write_json(args.out, result)
            print(json.dumps(row), flush=True)
    except USER_ERRORS as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0
