"""Pictures of `peers_gpu`: time per token over the experts' GPU memory, and over the context.

accelerate is in the table alone: its tokens take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_size.peers_table import NO_CACHE, cell_of
from benchmarks.kit.plots import load_pyplot

Row = dict[str, Any]
Point = tuple[float, float, float, float]
"""Where it lies, p20, p50 and p80."""
PANELS = (
    ("Qwen3-30B-A3B", "bf16", 1024),
    ("Qwen3-30B-A3B", "nvfp4", 1024),
    ("GPT-OSS-20B", "mxfp4", 1024),
    ("Qwen3-30B-A3B", "bf16", 65536),
)
CONTEXT_PANELS = (
    ("Qwen3-30B-A3B", "bf16", "25 %"),
    ("Qwen3-30B-A3B", "nvfp4", "25 %"),
    ("GPT-OSS-20B", "mxfp4", "25 %"),
    ("Qwen3-30B-A3B", "nvfp4", "100 %"),
)
COLOURS = {"freetoken": "tab:orange", "llama.cpp": "tab:green", "specmoe": "tab:blue"}
LABELS = {
    "freetoken": "FreeToken",
    "llama.cpp": "llama.cpp",
    "specmoe": "specmoe, the faster of its arms",
}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Above, a panel for each model, format and context; below, for each share of experts.

    Medians, bars from p20 to p80 (llama.cpp: of all runs of 48 tokens).

    Raises:
        ValueError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, len(PANELS), figsize=(14, 6.6))
    for axis, panel in zip(axes[0], PANELS, strict=True):
        _draw_lines(axis, points_of(rows, panel))
        model, form, context = panel
        axis.set_title(f"{model}, {form}, {context // 1024}k", fontsize=9)
        axis.set_xlabel("experts in GPU memory, GB")
    for axis, (model, form, place) in zip(axes[1], CONTEXT_PANELS, strict=True):
        _draw_lines(axis, contexts_of(rows, (model, form, place)))
        axis.set_title(f"{model}, {form}, {place} of the experts", fontsize=9)
        axis.set_xlabel("context, thousand tokens")
    for row in axes:
        row[0].set_ylabel("ms per token")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _draw_lines(axis: Any, lines: Mapping[str, Sequence[Point]]) -> None:
    for system, points in sorted(lines.items()):
        x, low, middle, high = zip(*points, strict=True)
        spread = [[m - a for m, a in zip(middle, low, strict=True)]]
        spread.append([b - m for m, b in zip(middle, high, strict=True)])
        style = {"marker": "o", "capsize": 3, "color": COLOURS[system]}
        axis.errorbar(x, middle, yerr=spread, label=LABELS[system], **style)
    axis.set_ylim(bottom=0)


def points_of(rows: Sequence[Row], panel: tuple[str, str, int]) -> dict[str, list[Point]]:
    """By system: its fastest arm with so many GB, in order of GB."""
    mine = [row for row in _shown(rows) if cell_of(row)[:3] == panel]
    full = max((row["cache_bytes"] or 0 for row in mine), default=0)
    # FreeToken's resident rows count no cache.
    held = [full if row["cache_bytes"] is None else row["cache_bytes"] for row in mine]
    places = [round(size / 1e8) / 10 for size in held]
    return _fastest(zip(places, mine, strict=True))


def contexts_of(rows: Sequence[Row], panel: tuple[str, str, str]) -> dict[str, list[Point]]:
    """By system: its fastest arm with this share of the experts, in order of contexts."""
    model, form, place = panel
    mine = ((row, cell_of(row)) for row in _shown(rows))
    wanted = [row for row, cell in mine if (cell[0], cell[1], cell[4]) == (model, form, place)]
    return _fastest((row["context"] / 1024, row) for row in wanted)


def _shown(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        if (
            "tpot_ms" in row
            and row["system"] in COLOURS
            and row["routing"] != "uniform"
            and not row["arm"].startswith(("lru", *NO_CACHE))
        ):
            yield row


def _fastest(placed: Iterator[tuple[float, Row]]) -> dict[str, list[Point]]:
    best: dict[tuple[str, float], Row] = {}
    for place, row in placed:
        key = (row["system"], place)
        if key not in best or row["tpot_ms"]["p50"] < best[key]["tpot_ms"]["p50"]:
            best[key] = row
    points: dict[str, list[Point]] = {}
    for (system, place), row in sorted(best.items()):
        times = row["tpot_ms"]
        low, high = times["p20"], times["p80"]
        if low is None:
            low, high = min(row["runs_ms"]), max(row["runs_ms"])
        points.setdefault(system, []).append((place, low, times["p50"], high))
    return points
