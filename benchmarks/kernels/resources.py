"""Compile every kernel for every target without a GPU, and write what that costs.

    python -m benchmarks kernel_resources --write docs/results/log/kernels.md
    python -m benchmarks kernel_resources --targets 90 --models Mixtral-8x7B --json out.json

Each launch that the `variants` module of a kernel names is compiled for a model's shape; registers,
shared memory and spills are read from the compiled code, bytes and operations are counted from the
launch's grid. Nothing is timed and nothing runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels import variants
from benchmarks.kernels.compile_spec import MODEL_SHAPES, PACKED_SHAPES, CompileSpec, ModelShape
from benchmarks.kit.places import RESULTS

ALL_SHAPES = (*MODEL_SHAPES, *PACKED_SHAPES)
TARGETS = (80, 86, 89, 90, 100)
# The most dynamic shared memory that one program may have, in bytes (CUDA C++ Programming Guide,
# table of technical specifications per compute capability).
SHARED_LIMIT_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
MAX_EXCESS = 0.05
TRITON_RUNS = RESULTS / "kernels_triton.json"
"""The kernels' tests and resources by version of Triton."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one compiled kernel needs on one target."""

    model: str
    label: str
    target: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    num_warps: int
    num_stages: int


def find_specs(shape: ModelShape) -> Iterator[CompileSpec]:
    """Every launch that a module of `kernels.variants` names for a model."""
    for module in sorted(pkgutil.iter_modules(variants.__path__), key=lambda item: item.name):
        if shape.format.is_plain != (module.name == "packed_experts"):
            yield from importlib.import_module(f"{variants.__name__}.{module.name}").compile_specs(
                shape
            )


def compile_key(spec: CompileSpec) -> str:
    """Equal for launches that run the same compiled kernel."""
    values = (spec.signature, spec.constexprs, spec.num_warps, spec.num_stages, spec.aligned)
    return f"{spec.kernel.__name__} {values!r}"


def compiled(spec: CompileSpec, target: int) -> Any:
    """What Triton compiles for compute capability `target`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned}
    source = ASTSource(spec.kernel, signature, constexprs=dict(spec.constexprs), attrs=aligned)
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": spec.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory of a thread, where spills go.

    The kernels have no arrays of their own in local memory, so that all of it is spills.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", log)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resource usage, but: {log.strip()[-200:]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def measure(models: Sequence[ModelShape], targets: Sequence[int]) -> list[Resources]:
    """Compile each different kernel of each model once per target."""
    rows: list[Resources] = []
    for shape in models:
        launches: dict[str, list[CompileSpec]] = {}
        for spec in find_specs(shape):
            launches.setdefault(compile_key(spec), []).append(spec)
        for specs in launches.values():
            # The plainest launch names the kernel: decode rather than its correction.
            spec = min(specs, key=lambda one: one.label.count(" "))
            for target in targets:
                kernel = compiled(spec, target)
                registers, spilled_bytes = read_usage(kernel.asm["cubin"])
                rows.append(
                    Resources(
                        model=shape.name,
                        label=spec.label,
                        target=target,
                        registers=registers,
                        shared_bytes=kernel.metadata.shared,
                        spilled_bytes=spilled_bytes,
                        num_warps=spec.num_warps,
                        num_stages=spec.num_stages,
                    )
                )
            print(f"{shape.name}: {spec.label}", file=sys.stderr)
    return rows


def find_problems(rows: Sequence[Resources], models: Sequence[ModelShape]) -> list[str]:
    """What must not be: spills, too much shared memory, bytes moved in vain."""
    problems = [
        f"{row.model}, {row.label}, sm_{row.target}: {row.spilled_bytes} bytes spilled"
        for row in rows
        if row.spilled_bytes
    ]
    problems += [
        f"{row.model}, {row.label}, sm_{row.target}: {row.shared_bytes} bytes of shared memory"
        for row in rows
        if row.shared_bytes > SHARED_LIMIT_BYTES[row.target]
    ]
    problems += [
        f"{shape.name}, {spec.label}: moves {spec.traffic.excess:.1%} more bytes than it must"
        for shape in models
        for spec in find_specs(shape)
        if spec.traffic is not None and spec.traffic.excess > MAX_EXCESS
    ]
    return problems


def resources_table(rows: Sequence[Resources], targets: Sequence[int]) -> list[str]:
    """One line per kernel and model: registers / shared KiB / spilled bytes of each target."""
    head = " | ".join(f"sm_{target}" for target in targets)
    lines = [
        f"| model | launch | warps, stages | {head} |",
        "|---|---|---|" + "---|" * len(targets),
    ]
    for model, label in dict.fromkeys((row.model, row.label) for row in rows):
        cells = {row.target: row for row in rows if (row.model, row.label) == (model, label)}
        first = next(iter(cells.values()))
        values = " | ".join(
            f"{cells[target].registers} / {cells[target].shared_bytes / 1024:.1f} /"
            f" {cells[target].spilled_bytes}"
            for target in targets
        )
        warps = f"{first.num_warps}, {first.num_stages}"
        lines.append(f"| {model} | {label} | {warps} | {values} |")
    return lines


def traffic_table(models: Sequence[ModelShape]) -> list[str]:
    """One line per launch: bytes needed, bytes moved, bytes read again from L2, operations."""
    lines = [
        "| model | launch | programs | needed, MB | moved, MB | excess | again from L2, MB |"
        " operations, M | operations per byte |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in models:
        for spec in find_specs(shape):
            traffic = spec.traffic
            if traffic is None:
                continue
            programs = 1
            for size in spec.grid:
                programs *= size
            lines.append(
                f"| {shape.name} | {spec.label} | {programs} | {traffic.needed_bytes / 1e6:.3f} |"
                f" {traffic.moved_bytes / 1e6:.3f} | {traffic.excess:.1%} |"
                f" {traffic.reread_bytes / 1e6:.2f} | {traffic.operations / 1e6:.2f} |"
                f" {traffic.operations / traffic.moved_bytes:.1f} |"
            )
    return lines


_HEAD = """# Kernels: resources, bytes and operations

Written by `python -m benchmarks kernel_resources --write docs/results/log/kernels.md`, without a
GPU: Triton {triton}, Python {python}. Nothing here is a time.

## Resources

Registers of a thread / dynamic shared memory of a program in KiB / bytes spilled by a thread, read
from the compiled code at the default configuration. Launches that run the same compiled kernel
(other token counts, `correct_experts`) are listed once.

"""
_TRAFFIC = """
## Bytes and operations

Counted from the launch's grid. *Needed*: every input byte that the result depends on read once,
every output byte written once. *Moved*: what loads and stores move between device memory and the
chip; lanes that are masked out move nothing. *Again from L2*: loads of bytes that another program
of the launch loads too; they are operands of at most a few megabytes (tokens, intermediates, slots)
or parts that neighbouring programs share (the weights of an expert that several tokens use). Where
L2 is smaller than an expert's share of the tokens (6 MB on sm_86), long prompts read those again
from device memory. Where the column is a multiple of *moved*, tokens share experts and L2 is the
bound: there the grouped kernels are the better choice. Tokens are spread over the experts as evenly
as can be. A test counts the same bytes lane by lane in Triton's interpreter, at small sizes.
Prompts of 4096 tokens are bound by arithmetic and have no line here. `gather_experts` reads records
from host memory and writes them to the device's. Plans are counted for one token by LRU whose
experts are all there; other plans depend on what is missing.

"""


_VERSIONS = """
## Versions of Triton

`tests/kernels` in Triton's interpreter: Python {python}, torch {torch}, NumPy {numpy}. Each version
was put before the installed one:

    pip install --no-deps --target FOLDER triton==VERSION
    PYTHONPATH=FOLDER:. python -m pytest tests/kernels

Skipped are tests that need a GPU; those passed on an H100 with Triton 3.6.0 ([results](h200.md)).
The last column, at commit {commit}: compiled for all targets as in the first table, launches times
targets, the most registers of a thread and the bytes spilled, all launches together.

| Triton | tests | commit | passed | failed | skipped | compiled, registers, spilled |
|---|---|---|---|---|---|---|
"""


def versions_section(path: Path) -> str:
    """The recorded runs as Markdown."""
    record = json.loads(path.read_text())
    lines = []
    for run in record["runs"]:
        compiled = "not compiled"
        if run["compiled"] is not None:
            counts = run["compiled"]
            compiled = f"{counts['kernels']}, {counts['most_registers']}, {counts['spilled_bytes']}"
        lines.append(
            f"| {run['triton']} | {run['tests']} | {run['commit'][:7]} | {run['passed']} |"
            f" {run['failed']} | {run['skipped']} | {compiled} |"
        )
    head = _VERSIONS.format(commit=record["commit"][:7], **record["versions"])
    return head + "\n".join(lines) + "\n"


def write_report(
    path: Path, rows: Sequence[Resources], models: Sequence[ModelShape], targets: Sequence[int]
) -> None:
    """Write both tables as Markdown, and the runs with other versions of Triton."""
    import triton

    head = _HEAD.format(triton=triton.__version__, python=platform.python_version())
    body = "\n".join(resources_table(rows, targets)) + "\n" + _TRAFFIC
    path.parent.mkdir(parents=True, exist_ok=True)
    traffic = "\n".join(traffic_table(models)) + "\n"
    path.write_text(head + body + traffic + versions_section(TRITON_RUNS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a kernel spills, does not fit, or moves bytes in vain."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernel_resources")
    names = [shape.name for shape in ALL_SHAPES]
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=TARGETS)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    models = [shape for shape in ALL_SHAPES if shape.name in options.models]
    rows = measure(models, options.targets)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.write:
        write_report(options.write, rows, models, options.targets)
    problems = find_problems(rows, models)
    for problem in problems:
        print(problem)
    return 1 if problems else 0
