"""The plots of docs/results/log/cpu-disk.md: PNG files beside the document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cpu_disk.figures import (
    GOAL,
    TIMED,
    Record,
    cells_of,
    figures,
    recall_by_layer,
    sort_key,
)
from benchmarks.kit.plots import load_pyplot

Found = Mapping[str, Record]


def draw_all(found: Found, report: Path) -> dict[str, str]:
    """Draw what there are results for; returns the document's lines that show the files, by name.

    Raises:
        ValueError: matplotlib is not installed.
    """
    pyplot = load_pyplot()

    plots: dict[str, tuple[str, Callable[[Found, Any], bool]]] = {
        "tpot": ("time per token by cache size, memory capped", _draw_tpot),
        "split": ("where the time goes", _draw_split),
        "limit": ("distance from the limit by cache size", _draw_limit),
        "recall": ("recall per layer", _draw_recall),
        "loss": ("loss against bytes", _draw_loss),
    }
    lines: dict[str, str] = {}
    for name, (title, draw) in plots.items():
        figure, axes = pyplot.subplots(figsize=(7.5, 4), constrained_layout=True)
        axes.set_title(title)
        if draw(found, axes):
            path = report.with_name(f"{report.stem}-{name}.png")
            # No date and no version in the file: the same results give the same bytes.
            figure.savefig(path, dpi=110, metadata={"Software": None})
            lines[name] = f"![{title}]({path.name})"
        pyplot.close(figure)
    return lines


def _by_arm(found: Found) -> dict[str, list[tuple[float, Record, Record]]]:
    """Capped cells with a cache size, by arm, smallest first."""
    arms: dict[str, list[tuple[float, Record, Record]]] = {}
    for cell, phase in cells_of(found, "tight", "roomy"):
        if cell["size"] is not None:
            arms.setdefault(cell["arm"], []).append((sort_key(cell["size"]), cell, phase))
    return {arm: sorted(points, key=lambda point: point[0]) for arm, points in arms.items()}


def _draw_tpot(found: Found, axes: Any) -> bool:
    arms = _by_arm(found)
    for arm, points in arms.items():
        tpot = [cell["tpot_ms"] for _, cell, _ in points]
        middle = [t["p50"] for t in tpot]
        around = [
            [t["p50"] - t["p20"] for t in tpot],
            [t["p80"] - t["p50"] for t in tpot],
        ]
        axes.errorbar(
            [x for x, *_ in points], middle, yerr=around, marker="o", capsize=3, label=arm
        )
    for size in found.get("tight", {}).get("refused", {}):
        axes.axvline(sort_key(size), color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="cache, % of all experts (dotted: refused by specmoe)", ylabel="ms/token")
    axes.set_yscale("log")
    axes.legend(fontsize="small", ncols=2)
    return bool(arms)


def _draw_split(found: Found, axes: Any) -> bool:
    names: list[str] = []
    parts: dict[str, list[float]] = {"compute": [], "demand stall": [], "overhead": []}
    for cell, phase in cells_of(found, *TIMED):
        own = figures(cell, phase)
        if own.stall_ms is None or own.overhead_ms is None or cell["arm"] == "resident":
            continue
        names.append(cell["name"])
        shares = (own.compute_ms, own.stall_ms, max(0.0, own.overhead_ms))
        for label, value in zip(parts, shares, strict=True):
            parts[label].append(value)
    left = [0.0] * len(names)
    for label, values in parts.items():
        axes.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="ms/token, mean")
    axes.tick_params(axis="y", labelsize="small")
    axes.legend(fontsize="small")
    return bool(names)


def _draw_limit(found: Found, axes: Any) -> bool:
    arms = _by_arm(found)
    for arm, points in arms.items():
        distances = [figures(cell, phase).distance for _, cell, phase in points]
        axes.plot([x for x, *_ in points], distances, marker="o", label=arm)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.axhline(GOAL, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="cache, % of all experts", ylabel="time over the limit")
    axes.set_yscale("log")
    axes.legend(fontsize="small", ncols=2)
    return bool(arms)


def _draw_recall(found: Found, axes: Any) -> bool:
    recall = recall_by_layer(found)
    known = [(layer, value) for layer, value in enumerate(recall) if value is not None]
    axes.bar([layer for layer, _ in known], [value for _, value in known])
    axes.set(xlabel="MoE layer", ylabel="recall of its experts", ylim=(0, 1))
    return bool(known)


def _draw_loss(found: Found, axes: Any) -> bool:
    policies = found.get("loss", {}).get("policies", [])
    for policy in policies:
        x, y = policy["bytes_per_token"] / 2**20, policy["loss_increase_nats"]
        axes.plot([x], [y], marker="o")
        axes.annotate(
            policy["name"], (x, y), fontsize="small", xytext=(5, 4), textcoords="offset points"
        )
    axes.set(xlabel="MiB read per token", ylabel="increase of loss, nats/byte")
    axes.margins(x=0.2, y=0.15)
    return bool(policies)
