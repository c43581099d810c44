"""Runs a benchmark by name: `python -m benchmarks RUN [arguments]`, names with `--list`."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kit.command import Main, explains_errors

RUNS = {
    "commits": "end_to_end.commits",
    "cpu_busy": "cpu_disk.busy",
    "cpu_disk": "cpu_disk.run",
    "end_to_end": "end_to_end.run",
    "evaluate": "reference_model.evaluate",
    "eviction": "simulation.eviction",
    "eviction_time": "cpu_disk.policies",
    "formats": "quality.formats",
    "formats_resident": "cpu_disk.formats_resident",
    "formats_time": "cpu_disk.formats_time",
    "gpu_decode": "hardware.decode",
    "gpu_down_kernel": "kernels.down_projection",
    "gpu_first_run": "hardware.first_run",
    "gpu_first_token": "full_size.first_token",
    "gpu_full_size": "full_size.run",
    "gpu_full_size_bound": "full_size.bound",
    "gpu_full_size_trials": "full_size.trials",
    "gpu_host_reads": "hardware.host_reads",
    "gpu_token": "full_size.token",
    "kernel_resources": "kernels.resources",
    "model_card": "reference_model.card",
    "peers_accelerate": "full_size.accelerate_peer",
    "peers_gpu": "full_size.peers",
    "peers_llama": "full_size.llama",
    "predicted_hardware": "simulation.predicted_hardware",
    "predictors": "predictors.run",
    "ranks": "ranks.run",
    "ranks_gpu": "ranks.gpu",
    "replay_check": "simulation.replay_check",
    "self_tuning": "speculation.self_tuning",
    "serving": "serving.run",
    "speculation": "speculation.run",
    "train": "reference_model.train",
    "widen": "reference_model.widen",
}
"""The module of each run, below this package: its docstring's first line says what it measures,
and its `main` takes the arguments that follow the name and returns the exit status."""


def about(name: str) -> str:
    """What a run measures, in one line, without importing it."""
    path = Path(__file__).parent.joinpath(*RUNS[name].split(".")).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def load(name: str) -> Main:
    """The `main` of a run.

    Raises:
        ValueError: there is no such run.
    """
    if name not in RUNS:
        raise ValueError(f"There is no benchmark {name!r}: give one of {', '.join(RUNS)}")
    main: Main = importlib.import_module(f"benchmarks.{RUNS[name]}").main
    return main


@explains_errors
def main(argv: Sequence[str] | None = None) -> int:
    """List the runs, or hand the arguments on to one."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "--list"):
        if name != "--list":
            print("usage: python -m benchmarks RUN [arguments]    (RUN --help says which)\n")
        for known in RUNS:
            print(f"{known:<21} {about(known)}")
        return 0
    return load(name)(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
