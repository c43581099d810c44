"""First run on a GPU: tests, host-to-device bandwidth, kernels against the floor, and decode.

    python -m benchmarks gpu_first_run --out gpu.json
    python -m benchmarks gpu_first_run --out gpu.json --only gather sanitizer
    TRITON_INTERPRET=1 python -m benchmarks gpu_first_run --out dry.json --dry
                                                   tiny, on the CPU: measures nothing

All of it takes about twelve minutes. Each phase prints a short table; everything goes to the JSON
file, also when a later phase fails. Decoding is in `benchmarks/hardware/decode.py`.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware.decode import measure_decode
from benchmarks.kernels.compile_spec import MODEL_SHAPES, ModelShape
from benchmarks.kernels.packed import measure_packed
from benchmarks.kit.command import run_parser
from specmoe_compile.bench.machine import provenance
from specmoe_compile.kernels.expert_mlp.op import run_experts_decode
from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm
from specmoe_compile.runtime.experts.layout import ExpertLayout
from specmoe_compile.system.output import write_json

RECORD_MB = (0.5, 1.0, 2.4, 4.7, 9.4, 13.2, 25.0)
RECORDS = (1, 2, 4, 8, 16)
TOKENS = (1, 2, 4, 8)
GATHERED = (1, 4, 8, 16)
GRIDS = (8, 16, 32, 64, 128)
SANITIZED = (
    "tests/kernels/test_plan_cache.py",
    "tests/kernels/test_gather_experts.py",
    "tests/kernels/test_correct_experts.py",
    "tests/kernels/test_packed_experts.py",
    "-m",
    "not slow",
    "-k",
    "not as_the_python_policy and not compiles_into and not opcheck",
)
SANITIZER_S = 100
ROTATED_BYTES = 2 << 30  # several times the L2, so that no repeat finds its weights there
REPEATS = 30
CALLS = 48  # of a captured step, so that launching its graph weighs as little as in a model
PHASES = ("link", "gather", "experts", "packed", "decode", "sanitizer", "tests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """Where the phases run: a GPU, or with `dry` the CPU, where tiny sizes show that they do."""

    dry: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def record_mb(self) -> tuple[float, ...]:
        """Sizes of records, in 1e6 bytes."""
        return (0.01, 0.02) if self.dry else RECORD_MB

    @property
    def shapes(self) -> tuple[ModelShape, ...]:
        """MoE layers of models."""
        if not self.dry:
            return MODEL_SHAPES
        return tuple(replace(s, hidden=64, intermediate=32, num_experts=8) for s in MODEL_SHAPES)

    def host_records(self, size: int) -> torch.Tensor:
        """As many random records as are moved at most, page-locked for a GPU."""
        records = torch.randint(0, 255, (max(RECORDS), size), dtype=torch.uint8)
        return records if self.dry else records.pin_memory()

    def median_ms(self, run: Callable[[int], object], repeats: int = REPEATS) -> float:
        """Median device time of `run(i)` in ms, by events, after a warm-up."""
        for i in range(3):
            run(i)
        times: list[float] = []
        for i in range(2 if self.dry else repeats):
            if self.dry:
                started = time.perf_counter()
                run(i)
                times.append((time.perf_counter() - started) * 1e3)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(i)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def captured(self, run: Callable[[], object]) -> Callable[[int], object]:
        """`run` as a CUDA graph that is replayed."""
        if self.dry:
            return lambda _: run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return lambda _: graph.replay()


def run_tests(rig: Rig) -> dict[str, Any]:
    """The kernel tests on this GPU: pytest's last line and exit code; dry, those for one found."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels"]
    command += ["-m", "gpu", "--collect-only"] if rig.dry else ["-m", "not slow"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join([*failures[:20], lines[-1] if lines else done.stderr[-500:]]))
    return {
        "exit_code": done.returncode,
        "summary": lines[-1] if lines else "",
        "failures": failures,
        "tail": "" if done.returncode == 0 else done.stdout[-6000:],
        "seconds": time.perf_counter() - started,
    }


def measure_memory_bandwidth(rig: Rig) -> float:
    """Read plus write bandwidth of a large device-to-device copy, GB/s."""
    size = 1 << 20 if rig.dry else 4 << 30
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / rig.median_ms(lambda _: target.copy_(source)) / 1e6


def _copy(target: torch.Tensor, source: torch.Tensor, _: int) -> None:
    target.copy_(source, non_blocking=True)


def _copy_each(target: torch.Tensor, source: torch.Tensor, _: int) -> None:
    for record in range(len(source)):
        target[record].copy_(source[record], non_blocking=True)


def measure_link(rig: Rig) -> list[dict[str, float]]:
    """Host-to-device GB/s by record size and count: one copy, one per record, these in a graph."""
    rows: list[dict[str, float]] = []
    for size_mb in rig.record_mb:
        size = int(size_mb * 1e6) // 4096 * 4096
        host = rig.host_records(size)
        device = torch.empty_like(host, device=rig.device)
        for count in RECORDS:
            source, target = host[:count], device[:count]
            moved = count * size / 1e6
            whole_ms = rig.median_ms(partial(_copy, target, source), 15)
            each_ms = rig.median_ms(partial(_copy_each, target, source), 15)
            # One launch for all records, which is the batched copy that PyTorch offers.
            graph = rig.captured(partial(_copy_each, target, source, 0))
            graph_ms = rig.median_ms(graph, 15)
            rows.append(
                {
                    "record_mb": size_mb,
                    "records": count,
                    "one_copy_gbps": moved / whole_ms,
                    "copy_per_record_gbps": moved / each_ms,
                    "copies_in_graph_gbps": moved / graph_ms,
                }
            )
        print(f"{size_mb:5.1f} MB x 8: ", {k: round(v, 1) for k, v in rows[-2].items()})
    return rows


def measure_gather(rig: Rig) -> list[dict[str, float]]:
    """GB/s of `gather_experts` by record size, count and grid, idle and beside a matrix product."""
    rows: list[dict[str, float]] = []
    width = 64 if rig.dry else 8192
    work = torch.randn(width, width, device=rig.device).bfloat16()
    out, side = torch.empty_like(work), None if rig.dry else torch.cuda.Stream()

    def beside(run: Callable[[int], object], i: int) -> None:
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with nullcontext() if side is None else torch.cuda.stream(side):
            for _ in range(8):  # several ms: longer than the transfer
                torch.mm(work, work, out=out)
        run(i)

    for size_mb in rig.record_mb:
        size = int(size_mb * 1e6) // 4096 * 4096
        host = rig.host_records(size)
        device = torch.empty_like(host, device=rig.device)
        fills = torch.arange(max(RECORDS), dtype=torch.int32, device=rig.device)
        for count in GATHERED:
            number = torch.tensor([count], dtype=torch.int32, device=rig.device)
            moved, source, target = count * size / 1e6, host[:count], device[:count]
            row = {"record_mb": size_mb, "records": count}
            for programs in GRIDS:
                run = partial(_gather, host, device, fills, number, programs)
                row[f"gather_{programs}_gbps"] = moved / rig.median_ms(run, 10)
                busy_ms = rig.median_ms(partial(beside, run), 10)
                row[f"gather_{programs}_busy_gbps"] = moved / busy_ms
                if not rig.dry:
                    torch.cuda.synchronize()
            each = partial(_copy_each, target, source)
            row["copy_per_record_gbps"] = moved / rig.median_ms(each, 10)
            row["copy_per_record_busy_gbps"] = moved / rig.median_ms(partial(beside, each), 10)
            rows.append(row)
            print({k: round(v, 1) for k, v in row.items()}, flush=True)
    return rows


def _gather(
    host: torch.Tensor,
    device: torch.Tensor,
    fills: torch.Tensor,
    number: torch.Tensor,
    programs: int,
    _: int,
) -> None:
    gather_experts([host], [device], fills, fills, number, programs=programs)


def run_sanitizer(rig: Rig) -> dict[str, Any]:
    """Small kernel tests under compute-sanitizer: errors of memcheck and racecheck."""
    if rig.dry:
        return {"not run": "it needs a GPU"}
    found: dict[str, Any] = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-q", "-x", *SANITIZED]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=SANITIZER_S,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            found[tool] = {"error": type(error).__name__}
        else:
            text = (done.stdout + done.stderr).splitlines()
            summary = [line for line in text if "SUMMARY" in line]
            passed = [line for line in text if " passed" in line or " failed" in line]
            found[tool] = {"exit_code": done.returncode, "summary": summary, "tests": passed}
        print(tool, found[tool], flush=True)
    return found


def make_banks(rig: Rig, shape: ModelShape) -> list[ExpertBank]:
    """Banks of random experts that together pass the L2 many times."""
    name = "gate_up_proj"
    up = (shape.hidden, shape.up_rows) if shape.transposed else (shape.up_rows, shape.hidden)
    down = (
        (shape.intermediate, shape.hidden)
        if shape.transposed
        else (shape.hidden, shape.intermediate)
    )
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: (up, torch.bfloat16)}
    if shape.has_bias:
        shapes[f"{name}_bias"] = ((shape.up_rows,), torch.bfloat16)
    shapes["down_proj"] = (down, torch.bfloat16)
    if shape.has_bias:
        shapes["down_proj_bias"] = ((shape.hidden,), torch.bfloat16)
    layout = ExpertLayout.from_shapes(shapes)
    slots = min(shape.num_experts, 32)
    count = 2 if rig.dry else max(2, ROTATED_BYTES // (slots * layout.record_bytes))
    banks: list[ExpertBank] = []
    for _ in range(count):
        records = torch.empty(slots, layout.record_bytes, dtype=torch.uint8, device=rig.device)
        views = layout.bank_views(records)
        for view in views.values():
            view.normal_(std=0.02)
        banks.append(ExpertBank.from_views(views))
    return banks


def measure_experts(rig: Rig, bandwidth_gbps: float) -> list[dict[str, Any]]:
    """Decode kernels at model shapes: time in a replayed graph of many calls, over the floor."""
    from benchmarks.kernels.variants.expert_mlp import form_of_shape

    rows: list[dict[str, Any]] = []
    for shape in rig.shapes:
        form = form_of_shape(shape)
        banks = make_banks(rig, shape)
        slots_per_bank = banks[0].up.shape[0]
        for tokens in TOKENS:
            x = torch.randn(tokens, shape.hidden, device=rig.device).bfloat16()
            weights = torch.rand(tokens, shape.top_k, device=rig.device).bfloat16()
            chosen = [
                torch.stack([torch.randperm(slots_per_bank)[: shape.top_k] for _ in range(tokens)])
                .int()
                .to(rig.device)
                for _ in range(CALLS)
            ]
            calls = list(zip(itertools.cycle(banks), chosen, strict=False))
            run_experts_decode(x, chosen[0], weights, banks[0], form)
            step = rig.captured(partial(_run_calls, x, weights, calls, form))
            call_ms = rig.median_ms(step) / CALLS
            distinct = statistics.mean(int(slots.unique().numel()) for slots in chosen)
            floor_ms = distinct * shape.expert_bytes / bandwidth_gbps / 1e6
            rows.append(
                {
                    "model": shape.name,
                    "tokens": tokens,
                    "call_us": call_ms * 1e3,
                    "floor_us": floor_ms * 1e3,
                    "over_floor": call_ms / floor_ms,
                    "distinct_experts": distinct,
                }
            )
            print(f"{shape.name:18s} T={tokens}  {call_ms * 1e3:8.1f} us  {call_ms / floor_ms:.2f}")
        del banks
        if not rig.dry:
            torch.cuda.empty_cache()
    return rows


def _run_calls(
    x: torch.Tensor,
    weights: torch.Tensor,
    calls: Sequence[tuple[ExpertBank, torch.Tensor]],
    form: ExpertForm,
) -> None:
    for bank, slots in calls:
        run_experts_decode(x, slots, weights, bank, form)


def run_decode(rig: Rig) -> Any:
    """Decode through the device session, see `benchmarks.hardware.decode`."""
    if rig.dry:
        return {"not run": "it needs a GPU; tests/runtime/cuda traces the same path without one"}
    return measure_decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases asked for and write the JSON file after each."""
    parser = run_parser("gpu_first_run", __doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_first_run.json"))
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none; run --dry", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rig = Rig(dry=args.dry)
    result: dict[str, Any] = {
        "schema": 1,
        "dry": args.dry,
        **provenance(),
        "device": "CPU" if args.dry else torch.cuda.get_device_name(),
        "seed": 0,
    }
    if args.dry:
        print("dry run on the CPU: times and rates below are not a GPU's and mean nothing")
    bandwidth = measure_memory_bandwidth(rig)
    result["memory_copy_gbps"] = bandwidth
    print(f"device-to-device copy: {bandwidth:.0f} GB/s read plus written")
    phases: dict[str, Callable[[Rig], Any]] = {
        "link": measure_link,
        "gather": measure_gather,
        "experts": partial(measure_experts, bandwidth_gbps=bandwidth),
        "packed": partial(measure_packed, bandwidth_gbps=bandwidth),
        "decode": run_decode,
        "sanitizer": run_sanitizer,
        "tests": run_tests,
    }
    for name, phase in phases.items():
        if name not in args.only:
            continue
        started = time.perf_counter()
        result[name] = phase(rig)
        write_json(args.out, result)
        print(f"-- {name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(json.dumps(result["versions"]))
    return 0
