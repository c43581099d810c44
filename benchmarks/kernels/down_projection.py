"""How long the down projection of one token takes, by how many of its choices have a slot.

    python -m benchmarks gpu_down_kernel --out down.json
    python -m benchmarks gpu_down_kernel --out down.json --dry     # tiny, on the CPU

`down_kernel` runs for a layer's resident experts and again for its late ones, and often one of the
two has nothing to do. Each figure is a launch of a CUDA graph of CALLS launches over banks that
pass the L2 many times, with other slots in each. Under a minute.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware.first_run import Rig, make_banks
from benchmarks.kernels.compile_spec import ModelShape
from benchmarks.kit.command import run_parser
from specmoe_compile.bench.machine import provenance
from specmoe_compile.system.output import write_json

SEED = 0
CALLS, REPEATS = 40, 15


def slots_of(count: int, top_k: int, slots: int) -> torch.Tensor:
    """[1, K] int32: `count` of K choices with different slots, -1 for the others."""
    chosen = torch.full((1, top_k), -1, dtype=torch.int32)
    chosen[0, torch.randperm(top_k)[:count]] = torch.randperm(slots)[:count].int()
    return chosen


def measure(rig: Rig, shape: ModelShape) -> dict[str, float]:
    """Microseconds of a launch by the number of choices that have a slot."""
    from benchmarks.kernels.variants.expert_mlp import form_of_shape
    from specmoe_compile.kernels.expert_mlp.launch import launch_down

    form = form_of_shape(shape)
    banks = make_banks(rig, shape)
    top_k = shape.top_k

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=rig.device).bfloat16()

    weights, intermediate = random(1, top_k), random(1, top_k, shape.intermediate)
    y, out = random(1, top_k, shape.hidden), random(1, shape.hidden)
    found: dict[str, float] = {}
    for count in sorted({0, 1, top_k // 2, top_k}):
        chosen = [
            slots_of(count, top_k, len(banks[0].up)).to(rig.device)
            for _ in range(1 if rig.dry else CALLS)
        ]
        calls = list(zip(itertools.cycle(banks), chosen, strict=False))

        def run(calls: Sequence[Any] = calls) -> None:
            for bank, slots in calls:
                launch_down(intermediate, slots, weights, bank, form, out, y=y)

        run()
        repeats = 1 if rig.dry else REPEATS
        found[str(count)] = rig.median_ms(rig.captured(run), repeats) / len(calls) * 1e3
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the JSON file; returns the exit status."""
    parser = run_parser("gpu_down_kernel", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, in Triton's interpreter")
    args = parser.parse_args(arguments)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        print("dry run on the CPU: the times below are not a GPU's and mean nothing")
    elif not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none; run --dry", file=sys.stderr)
        return 2
    torch.manual_seed(SEED)
    rig = Rig(dry=args.dry)
    launch_us: dict[str, dict[str, float]] = {}
    for shape in rig.shapes:
        launch_us[shape.name] = measure(rig, shape)
        times = ", ".join(f"{count}: {us:.1f}" for count, us in launch_us[shape.name].items())
        print(f"{shape.name:18s} us per launch by choices with a slot: {times}", flush=True)
    result = {
        "schema": 1,
        "dry": args.dry,
        **provenance(),
        "device": "CPU" if args.dry else torch.cuda.get_device_name(),
        "seed": SEED,
        "launch_us": launch_us,
    }
    write_json(args.out, result)
    return 0
