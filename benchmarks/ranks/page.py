"""The page of `python -m benchmarks ranks`: one section for each rate of the simulated links."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.ranks.figures import (
    SKIPPED,
    claims,
    links_alone_or_none,
    shares,
    told,
    turns_ms,
)
from specmoe_compile.cli.tables import markdown_table

HEAD = ("ranks", "slots per rank", "ms/token", "of turns", "hits", "misses/token", "of rank 0")


def results(folder: Path) -> dict[str, Any]:
    """All rates' results in a folder, by file name, the slowest link first."""
    found = [(path.name, json.loads(path.read_text())) for path in folder.glob("ranks_cpu_*.json")]
    return dict(sorted(found, key=lambda each: -each[1]["miss_ms"]))


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The document of results by file name, which are of one model and machine."""
    first = next(iter(found.values()))
    ranks, machine, model = first["ranks"], first["machine"], first["model"]
    lines = [
        "# Several ranks, simulated links",
        "",
        f"The reference model ({model['moe_layers']} layers of {model['experts'][0]} experts,"
        f" K = {model['top_k']}) in float32, experts on disk. **The links are simulated**: each"
        " rank has one of its own, on which records pass one after the other, each in the time"
        f" that is given. One rank and {ranks} ranks, each on {first['threads_per_rank']} thread"
        " and with the same slots per rank, run on the same machine in turns, loaded, compiled and"
        " warmed up before. Times are wall time per token of `generate`, without the first"
        f" {SKIPPED + 1} tokens of a turn. A ratio is of one turn; given are the median over the"
        " turns, and their range.",
        "",
        "Every layer has two sums over the ranks, and on these cores a rank waits longer for one"
        " with gloo than it computes. So links decide only where a record takes much longer than a"
        " sum. NCCL on two GPUs: [ranks_gpu.md](ranks_gpu.md).",
        "",
    ]
    for name, result in found.items():
        lines += _section(name, result)
    lines += [
        f"`python -m benchmarks ranks --miss-ms X` measures and writes this page. {machine['cpu']},"
        f" {machine['cores']} cores.",
        "",
    ]
    return "\n".join(lines)


def _section(name: str, result: Mapping[str, Any]) -> list[str]:
    ranks, turns = result["ranks"], 1 + max(row["turn"] for row in result["rows"])
    said = [f"- {c.text}: {c.measured}. {'Holds' if c.holds else 'Fails'}." for c in claims(result)]
    links = links_alone_or_none(result)
    if links is not None:
        said.append(
            f"- {ranks} ranks with {links[0]} slots each, the cache in all of one rank with"
            f" {links[1]}: {told(shares(result, *links))} x its time: what links alone give."
        )
    sum_us = result["all_reduce_us"]
    said.append(f"- A sum over the ranks takes {sum_us:.0f} us where ranks do nothing else.")
    return [
        f"## A record takes {result['miss_ms']:g} ms",
        "",
        *said,
        "",
        *markdown_table(HEAD, _body(result)).splitlines(),
        "",
        f"{turns} turns, {result['tokens_timed']} tokens timed in each; commit"
        f" {(result['commit'] or 'unknown')[:12]} ([data](../../benchmarks/results/{name})).",
        "",
    ]


def _body(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    body: list[tuple[str, ...]] = []
    cases = {(row["ranks"], row["slots"]): row["experts_per_rank"] for row in result["rows"]}
    for (ranks, slots), own in sorted(cases.items()):
        rows = [row for row in result["rows"] if (row["ranks"], row["slots"]) == (ranks, slots)]
        times = turns_ms(result, ranks, slots)
        steps = len(rows[0]["tokens"])
        body.append(
            (
                str(ranks),
                f"{slots} of {own}",
                f"{median(times):.1f}",
                f"{min(times):.1f} to {max(times):.1f}",
                f"{100 * fmean(row['hit_rate'] for row in rows):.1f} %",
                f"{fmean(row['misses'] for row in rows) / steps:.1f}",
                f"{fmean(row['misses_of_rank_0'] for row in rows) / steps:.1f}",
            )
        )
    return body
