"""What the result files of `benchmarks cpu_disk` say: times split, bytes, distance from the limit.

The limit of a cell is max(bytes missed / measured bandwidth of the disk, time with everything
resident), per token: what reading alone, or computing alone, would take. The bandwidth is the mean
of two readings, just before and just after the run that it is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

TIMED = ("tight", "roomy", "uncapped")
GOAL = 1.10
SCHEMA = 2
"""Of the result files; 2 says how many tokens a cell generated, and in which processes."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Derived figures of one cell, per token; means over the tokens of a run, medians of runs.

    Attributes:
        mean_ms: time.
        compute_ms: time of the cell `resident` of the same phase.
        stall_ms: nothing to compute, waiting for reads; None without specmoe's counters.
        overhead_ms: the rest: what speculation, copying and shared cores cost.
        missed_bytes: read because it was not there and needed; for a peer, what the kernel read
            from the disk for it; None where nobody says.
        read_bytes: all that was read, wrong guesses included.
        hit_rate: of the expert cache; None without one.
        link_gbps: the disk's bandwidth around the runs.
        limit_ms: lower bound. distance: mean_ms over it.
        distance_range: smallest and largest of the runs.
    """

    mean_ms: float
    compute_ms: float
    stall_ms: float | None
    overhead_ms: float | None
    missed_bytes: float | None
    read_bytes: float | None
    hit_rate: float | None
    link_gbps: float
    limit_ms: float
    distance: float
    distance_range: tuple[float, float]


def read_results(results: Path) -> dict[str, Record]:
    """The result of each phase that there is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one is of another schema.
    """
    found = {
        phase: json.loads(path.read_text(encoding="utf-8"))
        for phase in (*TIMED, "loss")
        if (path := results / f"cpu_disk_{phase}.json").is_file()
    }
    for phase, result in found.items():
        if result["schema"] != SCHEMA:
            raise ValueError(
                f"cpu_disk_{phase}.json has schema {result['schema']}, expected {SCHEMA}: run"
                f" python -m benchmarks cpu_disk --only {phase}."
            )
    if not set(found) & set(TIMED):
        raise FileNotFoundError(f"{results} has no cpu_disk_*.json: run the phases first.")
    return found


def figures(cell: Record, phase: Record) -> Figures:
    """Derive a cell's figures; `phase` is the result that it is part of."""
    compute_ms = _compute_ms(phase)
    tokens = cell["samples"] / cell["repeats"]
    runs = [_run_figures(run, tokens, compute_ms) for run in cell["per_run"]]
    stall_ms = _median_or_none([run["stall_ms"] for run in runs])
    mean_ms = median([run["mean_ms"] for run in runs])
    distances = [run["mean_ms"] / run["limit_ms"] for run in runs]
    return Figures(
        mean_ms=mean_ms,
        compute_ms=compute_ms,
        stall_ms=stall_ms,
        overhead_ms=None if stall_ms is None else mean_ms - compute_ms - stall_ms,
        missed_bytes=_median_or_none([run["missed_bytes"] for run in runs]),
        read_bytes=_median_or_none([run["read_bytes"] for run in runs]),
        hit_rate=cell["hit_rate"],
        link_gbps=median([run["link_gbps"] for run in runs]),
        limit_ms=median([run["limit_ms"] for run in runs]),
        distance=median(distances),
        distance_range=(min(distances), max(distances)),
    )


def _run_figures(run: Record, tokens: float, compute_ms: float) -> dict[str, Any]:
    total = run["total"]
    if total is None:
        missed = read = None if run["disk_read_bytes"] is None else run["disk_read_bytes"] / tokens
    else:
        missed = (total["demand_bytes"] + total["useful_speculative_bytes"]) / tokens
        read = (total["demand_bytes"] + total["speculative_bytes"]) / tokens
    reading_ms = (missed or 0.0) / 1e6 / run["link_gbps"]
    return {
        "mean_ms": run["mean_ms"],
        "stall_ms": None if total is None else total["stall_ms"] / tokens,
        "missed_bytes": missed,
        "read_bytes": read,
        "link_gbps": run["link_gbps"],
        "limit_ms": max(reading_ms, compute_ms),
    }


def _compute_ms(phase: Record) -> float:
    """Mean time per token with everything resident, in the same phase.

    Raises:
        ValueError: the phase has no cell `resident`: there is nothing to compare with.
    """
    for cell in phase["cells"]:
        if cell["arm"] == "resident":
            return float(median(run["mean_ms"] for run in cell["per_run"]))
    raise ValueError("The phase has no cell 'resident', which its limits are computed from.")


def _median_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def cells_of(found: Mapping[str, Record], *phases: str) -> list[tuple[Record, Record]]:
    """Cells of some phases, each with its phase."""
    return [
        (cell, found[name]) for name in phases if name in found for cell in found[name]["cells"]
    ]


def recall_by_layer(found: Mapping[str, Record]) -> list[float | None]:
    """Recall of each layer's experts where every step was predicted; None for the first layer."""
    for cell, _ in cells_of(found, "uncapped"):
        if cell["label"] == "always":
            return [
                layer["recalled"] / layer["needed"] if layer["needed"] else None
                for layer in cell["layers"]
            ]
    return []


def drift(phase: Record) -> float | None:
    """Slowest over fastest median of the sentinel; None if a run of it failed."""
    medians = phase["sentinel"]["medians_ms"]
    if any(ms is None for ms in medians):
        return None
    return float(max(medians) / min(medians))


def sort_key(size: str | None) -> float:
    """Cache sizes in order; cells without one come first."""
    return -1.0 if size is None else float(size.removesuffix("%"))
