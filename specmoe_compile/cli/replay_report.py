"""What `specmoe replay` found, as a table and as JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from specmoe_compile.cli.tables import print_table
from specmoe_compile.options import SessionOptions
from specmoe_compile.replay.summary import PAYS, Summary
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.system.sizes import format_bytes

LABEL = "replayed on simulated time, not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Replays, sizes that were refused and why, and what suffices by policy and predictor."""

    summaries: list[Summary]
    refused: list[dict[str, str]]
    sufficient: list[dict[str, Any]]


def as_dict(
    trace: RoutingTrace, machine: dict[str, Any], speculation: SessionOptions, result: Result
) -> dict[str, Any]:
    return {
        "schema": 1,
        "label": LABEL,
        "trace": {
            "model": trace.model,
            "fingerprint": trace.fingerprint,
            "steps": len(trace.tokens),
            "tokens": sum(trace.tokens),
            "setting": dict(trace.setting),
        },
        "machine": machine,
        "speculation": speculation.as_dict(),
        "replays": [summary.as_dict() for summary in result.summaries],
        "refused": result.refused,
        "sufficient": result.sufficient,
    }


_HEAD = ("cache", "slots", "policy", "predictor", "hits", "Belady", "recall", "on demand/token")
_HEAD_TIMES = ("ahead/token", "stall/token", "ms/token")


def print_report(
    trace: RoutingTrace, machine: dict[str, Any], result: Result, number_format: str | None
) -> None:
    link, steps = machine["link"], result.summaries[0].decode_steps
    size = format_bytes(max(trace.record_bytes))
    experts = f" Experts as in {number_format}, {size} each." if number_format else ""
    print(
        f"{trace.model}: {LABEL}.{experts} Link {link['gbps']:.2f} GB/s, computing"
        f" {machine['compute_ms']:.2f} ms per step, {steps} decode steps." + _ranks_line(machine)
    )
    print_table((*_HEAD, *_HEAD_TIMES), [_row(summary) for summary in result.summaries], keys=4)
    for row in {item["expert_cache"]: item for item in result.refused}.values():
        print(f"Not replayed: {row['expert_cache']}: {row['reason']}", file=sys.stderr)
    for row in result.sufficient:
        print(
            f"{row['cache_policy']}, predictor {row['predictor']}: a cache larger than"
            f" {100 * row['share']:.0f} % ({row['slots']} experts per layer) saves at most"
            f" {100 * PAYS:.0f} % more."
        )
    print(
        "Belady: the best hit rate that any cache of this size without prefetch can have.",
        *_machine_notes(machine),
        file=sys.stderr,
    )


def _ranks_line(machine: dict[str, Any]) -> str:
    if machine["ranks"] == 1:
        return ""
    return (
        f" {machine['ranks']} ranks, each with such a link, {machine['all_reduce_us']:g} us per"
        " sum; caches are per rank, counts and bytes of all."
    )


def _machine_notes(machine: dict[str, Any]) -> list[str]:
    notes = []
    if machine["from_trace"]:
        notes.append(f"Measured while recording: {', '.join(machine['from_trace'])}.")
    if machine["measured"]["tpot_ms"] is not None:
        notes.append(f"The recorded run took {machine['measured']['tpot_ms']:.2f} ms per step.")
    return notes


def _row(summary: Summary) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    return (
        summary.expert_cache,
        str(summary.slots) if summary.slots else "-",
        summary.cache_policy,
        summary.predictor,
        percent(summary.hit_rate),
        percent(summary.belady_hit_rate),
        percent(summary.recall),
        format_bytes(round(summary.demand_bytes_per_token)),
        format_bytes(round(summary.speculative_bytes_per_token)),
        f"{summary.stall_ms_per_token:.2f} ms",
        f"{summary.tpot_mean_ms:.2f}",
    )
