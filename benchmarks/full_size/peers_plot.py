"""Pictures of `peers_gpu`: time per token over the experts' GPU memory, and over the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit.plots import load_pyplot

Row = dict[str, Any]
PANELS = (
    ("Qwen3-30B-A3B", "bf16", 1024),
    ("Qwen3-30B-A3B", "nvfp4", 1024),
    ("GPT-OSS-20B", "mxfp4", 1024),
    ("Qwen3-30B-A3B", "bf16", 65536),
)
COLOURS = {"freetoken": "tab:orange", "specmoe": "tab:blue"}
LABELS = {"freetoken": "FreeToken", "specmoe": "specmoe, the faster of its arms"}


def draw(rows: Sequence[Row], file: Path) -> None:
    """One panel for each model, format and context; medians, bars from p20 to p80.

    Raises:
        ValueError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(14, 3.4))
    for axis, panel in zip(axes, PANELS, strict=True):
        for system, points in sorted(points_of(rows, panel).items()):
            x, low, middle, high = zip(*points, strict=True)
            spread = [[m - a for m, a in zip(middle, low, strict=True)]]
            spread.append([b - m for m, b in zip(middle, high, strict=True)])
            style = {"marker": "o", "capsize": 3, "color": COLOURS[system]}
            axis.errorbar(x, middle, yerr=spread, label=LABELS[system], **style)
        model, form, context = panel
        axis.set_title(f"{model}, {form}, {context // 1024}k", fontsize=9)
        axis.set_xlabel("experts in GPU memory, GB")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("ms per token")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def points_of(
    rows: Sequence[Row], panel: tuple[str, str, int]
) -> dict[str, list[tuple[float, float, float, float]]]:
    """By system: GB, p20, p50, p80 of its fastest arm with so many bytes, in order of bytes."""
    best: dict[tuple[str, int], Row] = {}
    mine = [r for r in rows if (r["model"], r["format"], r["context"]) == panel]
    mine = [r for r in mine if "tpot_ms" in r and not r["arm"].startswith("lru")]
    full = max((r["cache_bytes"] or 0 for r in mine), default=0)
    for row in mine:
        held = row["cache_bytes"] or full  # FreeToken's resident rows count no cache
        key = (row["system"], round(held / 1e8))
        if key not in best or row["tpot_ms"]["p50"] < best[key]["tpot_ms"]["p50"]:
            best[key] = row
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for (system, held), row in sorted(best.items()):
        spread = row["tpot_ms"]
        point = (held / 10, spread["p20"], spread["p50"], spread["p80"])
        points.setdefault(system, []).append(point)
    return points
