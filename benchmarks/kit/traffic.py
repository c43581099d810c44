"""What arms read and waited per token, from the counters of their sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specmoe_compile.bench.records import ArmRun
from specmoe_compile.system.sizes import format_bytes

Total = Mapping[str, float]
"""Counters of `LayerStats` by name, over all layers."""


def counted(runs: Sequence[ArmRun]) -> dict[str, float]:
    """Counters of several runs while they decoded, with `read_busy_ms`."""
    decodes = [run.decode for run in runs if run.decode is not None]
    return summed([{**d["total"], "read_busy_ms": d["read_busy_ms"]} for d in decodes])


def summed(totals: Sequence[Total]) -> dict[str, Any]:
    """Add counters up."""
    return {key: sum(total[key] for total in totals) for key in totals[0]}


def predicted_share(total: Total) -> float:
    """Share of the experts needed that were needed in steps which were predicted."""
    return total["needed"] / max(1, total["hits"] + total["misses"])


TRAFFIC_HEAD = ("on demand/token", "ahead/token", "of it useful", "stall/token")


def traffic_cells(total: Total, layers: int) -> tuple[str, ...]:
    """Cells of `TRAFFIC_HEAD`; `layers` is the number of MoE layers."""
    tokens = total["steps"] / layers
    ahead = total["speculative_bytes"]
    return (
        format_bytes(round(total["demand_bytes"] / tokens)),
        format_bytes(round(ahead / tokens)),
        f"{100 * total['useful_speculative_bytes'] / ahead:.0f} %" if ahead else "-",
        f"{total['stall_ms'] / tokens:.1f} ms",
    )
