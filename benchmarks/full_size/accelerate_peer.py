"""Hugging Face with accelerate on a GPU at full size: rows for `peers_gpu`.

    python -m benchmarks peers_accelerate --model Qwen3-30B-A3B --out accelerate.jsonl
    python -m benchmarks peers_accelerate --dry --out dry.jsonl

The unmodified model, eager, random weights, placed as `device_map="auto"` places it where
`max_memory` leaves room for 50 or 25 % of the experts: accelerate moves whole decoder layers, and
copies a layer that is in RAM to the GPU each time that it runs. With 100 % there are no hooks. A
token takes seconds with layers in RAM, so a row has 8 tokens after 1 there, and 48 after 16 with
everything on the GPU. `generate` is greedy, with a streamer. Rows that are there are kept.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.full_size.arms import free_memory
from benchmarks.full_size.clock import Clock
from benchmarks.full_size.model import DRY_SHAPES, SEED, SHAPES, Shape, random_tokens
from benchmarks.full_size.peer_rows import RowFile
from benchmarks.kit.command import run_parser
from benchmarks.kit.turns import preparing, turn
from specmoe_compile.bench.records import spread
from specmoe_compile.system.output import USER_ERRORS, sentence

SHARES = (100, 50, 25)
RESIDENT_TOKENS, MOVED_TOKENS = (16, 48), (1, 8)
"""Tokens before those that are timed, and timed."""


def build(shape: Shape, device: torch.device, layers: int | None) -> Any:
    """The unmodified model with random weights on `device`, each tensor made where it stays."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(shape.configured(layers), dtype=shape.dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, empty in list(model.named_parameters()):
        value = torch.ones(empty.shape, dtype=empty.dtype, device=device)
        if "norm" not in name:
            value.normal_(std=model.config.initializer_range, generator=generator)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    return model.eval().to(device)


def expert_bytes(module: nn.Module) -> int:
    """Of the parameters of experts below it."""
    named = module.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in named if ".experts." in f".{name}")


def device_map(model: Any, share: int, tiers: tuple[Any, Any]) -> Mapping[str, Any]:
    """Where accelerate puts what, if so many per cent of the experts' bytes fit beside the rest.

    It keeps room for the largest layer, which is where layers in RAM go when they run.

    Args:
        model: all of it in one place.
        share: per cent.
        tiers: accelerate's names of the GPU and of what is below it.
    """
    from accelerate import infer_auto_device_map

    total = sum(p.numel() * p.element_size() for p in model.parameters())
    experts = expert_bytes(model)
    layer = max(
        sum(p.numel() * p.element_size() for p in layer.parameters())
        for layer in model.model.layers
    )
    places: Mapping[str, Any] = infer_auto_device_map(
        model,
        max_memory={
            tiers[0]: total - experts + experts * share // 100 + layer,
            tiers[1]: 2 * total,
        },
        no_split_module_classes=model._no_split_modules,
    )
    return places


def place(model: Any, share: int, device: torch.device) -> int:
    """Move layers to RAM and attach accelerate's hooks; bytes of experts that stay on the GPU."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    if share == 100:
        return expert_bytes(model)
    remove_hook_from_submodules(model)
    tiers = (device.index, "cpu") if device.type == "cuda" else ("cpu", "disk")
    places = device_map(model, share, tiers)
    if set(places) == {""}:
        return expert_bytes(model)  # all of it fits
    stays = {name for name, where in places.items() if where == tiers[0]}
    for name in places:
        model.get_submodule(name).to(device if name in stays else "cpu")
    free_memory(device)
    # Without a GPU there is nothing to dispatch to: the hooks run, and move nothing.
    named = {name: tiers[0] if name in stays else "cpu" for name in places}
    dispatch_model(model, named, main_device=device, force_hooks=True)
    return sum(expert_bytes(model.get_submodule(name)) for name in stays)


@torch.no_grad()
def measure(model: Any, prompt: torch.Tensor, before: int, timed: int) -> dict[str, Any]:
    """Times of one placement: the first token of the prompt, and those after it."""
    clock, started = Clock(), time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1 + before + timed,
        min_new_tokens=1 + before + timed,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    times = clock.times[before:]
    spans = [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    return {
        "tpot_ms": spread(spans),
        "mean_ms": statistics.fmean(spans),
        "tokens": len(spans),
        "device_ms": None,
        "ttft_ms": 1e3 * (clock.times[0] - started),
        "hit_rate": None,
    }


def run(args: Any, device: torch.device) -> None:
    """All placements asked for, of one model: everything on the GPU first."""
    shape, rows = SHAPES[args.model], RowFile(args.out)
    if not shape.format.is_plain:
        raise ValueError(f"accelerate moves models as they are: {shape.name} is packed here.")
    end = time.monotonic() + args.budget_s
    cells = {
        share: {
            "system": "accelerate",
            "arm": "resident" if share == 100 else f"device_map_{share}",
            "model": shape.name,
            "format": str(shape.dtype).removeprefix("torch.").replace("bfloat", "bf"),
            "context": args.context,
            "routing": "own",
        }
        for share in sorted(args.shares, reverse=True)
    }
    cells = {share: cell for share, cell in cells.items() if not rows.has(cell)}
    if not cells:
        return
    with preparing(args.turns):
        model = build(shape, device, args.layers)
    prompt = random_tokens(model.config.vocab_size, args.context, device)
    for share, cell in cells.items():
        if time.monotonic() > end:
            rows.keep({**cell, "not_run": f"no time was left of {args.budget_s:.0f} s"})
            continue
        with preparing(args.turns):
            held = place(model, share, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before, timed = RESIDENT_TOKENS if share == 100 else MOVED_TOKENS
        with turn(args.turns):
            if share == 100:
                measure(model, prompt, 0, 2)  # compiles and loads what a first call does
            figures = measure(model, prompt, before, timed)
        reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        places = {"gpu_bytes": reserved, "host_bytes": psutil.Process().memory_info().rss}
        rows.keep({**cell, "cache_bytes": held, **figures, **places})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and keep rows; returns the exit status."""
    parser = run_parser("peers_accelerate", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of the rows")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--model", choices=sorted(SHAPES))
    parser.add_argument("--context", type=int, help="tokens of the prompt, 1024")
    parser.add_argument("--shares", nargs="+", type=int, choices=SHARES, default=list(SHARES))
    parser.add_argument("--layers", type=int, help="fewer layers than the model's own")
    parser.add_argument("--turns", type=Path, help="file of the processes that measure beside it")
    parser.add_argument("--budget-s", type=float, default=240.0, help="begin nothing after this")
    args = parser.parse_args(arguments)
    args.model = args.model or (DRY_SHAPES[0] if args.dry else "Qwen3-30B-A3B")
    args.context = args.context or (16 if args.dry else 1024)
    if not args.dry and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none; run --dry", file=sys.stderr)
        return 2
    try:
        run(args, torch.device("cpu") if args.dry else torch.device("cuda", 0))
    except USER_ERRORS as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0
