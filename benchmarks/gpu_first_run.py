"""First run on a GPU: tests, host-to-device bandwidth, kernels against the floor, and decode.

    python -m benchmarks.gpu_first_run --out gpu.json
    python -m benchmarks.gpu_first_run --out gpu.json --only gather sanitizer

All of it takes about twelve minutes. Each phase prints a short table; everything goes to the JSON
file, also when a later phase fails. Decoding is in `benchmarks/gpu_decode.py`.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_decode import measure_decode
from specmoe_compile.cli.measure.machine import commit_or_none, describe_machine, versions
from specmoe_compile.cli.output import write_json
from specmoe_compile.kernels.compile_spec import MODEL_SHAPES, ModelShape
from specmoe_compile.kernels.expert_form import ExpertBank, ExpertForm
from specmoe_compile.kernels.expert_mlp.op import run_experts_decode
from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.runtime.layout import ExpertLayout

RECORD_MB = (0.5, 1.0, 2.4, 4.7, 9.4, 13.2, 25.0)
RECORDS = (1, 2, 4, 8, 16)
TOKENS = (1, 2, 4, 8)
GATHERED = (1, 4, 8)
GRIDS = (8, 16, 32, 64, 128)
SANITIZED = (
    "tests/kernels/test_plan_cache.py",
    "tests/kernels/test_gather_experts.py",
    "tests/kernels/test_correct_experts.py",
    "-k",
    "not as_the_python_policy and not compiles_into and not opcheck",
)
SANITIZER_S = 100
ROTATED_BYTES = 2 << 30  # several times the L2, so that no repeat finds its weights there
REPEATS = 30
CALLS = 48  # of a captured step, so that launching its graph weighs as little as in a model
PHASES = ("link", "gather", "experts", "decode", "sanitizer", "tests")


def median_ms(run: Callable[[int], object], repeats: int = REPEATS) -> float:
    """Median device time of `run(i)` in ms, by events, after a warm-up."""
    for i in range(3):
        run(i)
    times: list[float] = []
    for i in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(i)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def run_tests() -> dict[str, Any]:
    """The kernel tests on this GPU: pytest's last line and exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-m", "not slow"]
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


def measure_memory_bandwidth() -> float:
    """Read plus write bandwidth of a large device-to-device copy, GB/s."""
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda _: target.copy_(source)) / 1e6


def _copy(target: torch.Tensor, source: torch.Tensor, _: int) -> None:
    target.copy_(source, non_blocking=True)


def _copy_each(target: torch.Tensor, source: torch.Tensor, _: int) -> None:
    for record in range(len(source)):
        target[record].copy_(source[record], non_blocking=True)


def measure_link() -> list[dict[str, float]]:
    """Host-to-device GB/s by record size and count: one copy, and one copy per record."""
    rows: list[dict[str, float]] = []
    for size_mb in RECORD_MB:
        size = int(size_mb * 1e6) // 4096 * 4096
        host = torch.randint(0, 255, (max(RECORDS), size), dtype=torch.uint8).pin_memory()
        device = torch.empty_like(host, device="cuda")
        for count in RECORDS:
            source, target = host[:count], device[:count]
            moved = count * size / 1e6
            whole_ms = median_ms(partial(_copy, target, source), 15)
            each_ms = median_ms(partial(_copy_each, target, source), 15)
            rows.append(
                {
                    "record_mb": size_mb,
                    "records": count,
                    "one_copy_gbps": moved / whole_ms,
                    "copy_per_record_gbps": moved / each_ms,
                }
            )
        print(f"{size_mb:5.1f} MB x 8: ", {k: round(v, 1) for k, v in rows[-2].items()})
    return rows


def measure_gather() -> list[dict[str, float]]:
    """GB/s of `gather_experts` by record size, count and grid, idle and beside a matrix product."""
    rows: list[dict[str, float]] = []
    work = torch.randn(8192, 8192, device="cuda").bfloat16()
    out, side = torch.empty_like(work), torch.cuda.Stream()

    def beside(run: Callable[[int], object], i: int) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(8):  # several ms: longer than the transfer
                torch.mm(work, work, out=out)
        run(i)

    for size_mb in RECORD_MB:
        size = int(size_mb * 1e6) // 4096 * 4096
        host = torch.randint(0, 255, (max(RECORDS), size), dtype=torch.uint8).pin_memory()
        device = torch.empty_like(host, device="cuda")
        fills = torch.arange(max(RECORDS), dtype=torch.int32, device="cuda")
        for count in GATHERED:
            number = torch.tensor([count], dtype=torch.int32, device="cuda")
            moved, source, target = count * size / 1e6, host[:count], device[:count]
            row = {"record_mb": size_mb, "records": count}
            for programs in GRIDS:
                run = partial(_gather, host, device, fills, number, programs)
                row[f"gather_{programs}_gbps"] = moved / median_ms(run, 10)
                busy_ms = median_ms(partial(beside, run), 10)
                row[f"gather_{programs}_busy_gbps"] = moved / busy_ms
                torch.cuda.synchronize()
            each = partial(_copy_each, target, source)
            row["copy_per_record_gbps"] = moved / median_ms(each, 10)
            row["copy_per_record_busy_gbps"] = moved / median_ms(partial(beside, each), 10)
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


def run_sanitizer() -> dict[str, Any]:
    """Small kernel tests under compute-sanitizer: errors of memcheck and racecheck."""
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


def _banks(shape: ModelShape, form: ExpertForm) -> list[ExpertBank]:
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
    count = max(2, ROTATED_BYTES // (slots * layout.record_bytes))
    banks: list[ExpertBank] = []
    for _ in range(count):
        records = torch.empty(slots, layout.record_bytes, dtype=torch.uint8, device="cuda")
        views = layout.bank_views(records)
        for view in views.values():
            view.normal_(std=0.02)
        banks.append(ExpertBank.from_views(views))
    return banks


def measure_experts(bandwidth_gbps: float) -> list[dict[str, Any]]:
    """Decode kernels at model shapes: time in a replayed graph of many calls, over the floor."""
    rows: list[dict[str, Any]] = []
    for shape in MODEL_SHAPES:
        form = ExpertForm(
            activation=shape.activation,
            alpha=shape.alpha,
            limit=shape.limit,
            interleaved=shape.interleaved,
            transposed=shape.transposed,
        )
        banks = _banks(shape, form)
        slots_per_bank = banks[0].up.shape[0]
        for tokens in TOKENS:
            x = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
            weights = torch.rand(tokens, shape.top_k, device="cuda").bfloat16()
            chosen = [
                torch.stack([torch.randperm(slots_per_bank)[: shape.top_k] for _ in range(tokens)])
                .int()
                .cuda()
                for _ in range(CALLS)
            ]
            calls = list(zip(itertools.cycle(banks), chosen, strict=False))
            run_experts_decode(x, chosen[0], weights, banks[0], form)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for bank, slots in calls:
                    run_experts_decode(x, slots, weights, bank, form)
            call_ms = median_ms(lambda _, graph=graph: graph.replay()) / CALLS
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
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Run the phases asked for and write the JSON file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_first_run.json"))
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none; run it on one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "schema": 1,
        "commit": commit_or_none(),
        "machine": describe_machine(),
        "versions": versions(),
        "device": torch.cuda.get_device_name(),
        "seed": 0,
    }
    bandwidth = measure_memory_bandwidth()
    result["memory_copy_gbps"] = bandwidth
    print(f"device-to-device copy: {bandwidth:.0f} GB/s read plus written")
    phases: list[tuple[str, Callable[[], Any]]] = [
        ("link", measure_link),
        ("gather", measure_gather),
        ("experts", lambda: measure_experts(bandwidth)),
        ("decode", measure_decode),
        ("sanitizer", run_sanitizer),
        ("tests", run_tests),
    ]
    for name, phase in phases:
        if name not in args.only:
            continue
        started = time.perf_counter()
        result[name] = phase()
        write_json(args.out, result)
        print(f"-- {name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(json.dumps(result["versions"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
