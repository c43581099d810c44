"""The page of `python -m benchmarks ranks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.kit.claims import Claim
from benchmarks.ranks.figures import SKIPPED, links_alone_or_none, shares, told, turns_ms
from specmoe_compile.cli.tables import markdown_table

HEAD = ("ranks", "slots per rank", "ms/token", "of turns", "hits", "misses/token", "of rank 0")


def page(result: Mapping[str, Any], claims: Sequence[Claim]) -> str:
    """The document; `claims` are the result's."""
    ranks, machine, model = result["ranks"], result["machine"], result["model"]
    turns = 1 + max(row["turn"] for row in result["rows"])
    said = [f"- {c.text}: {c.measured}. {'Holds' if c.holds else 'Fails'}." for c in claims]
    links = links_alone_or_none(result)
    if links is not None:
        said.append(
            f"- {ranks} ranks with {links[0]} slots each, the cache in all of one rank with"
            f" {links[1]}: {told(shares(result, *links))} x its time. That is what the links alone"
            " give; a layer waits for the rank with the most misses, so it is more than 1 / N."
        )
    said.append(f"- A sum over the ranks takes {result['all_reduce_us']:.0f} us here (gloo).")
    return "\n".join(
        [
            "# Several ranks, simulated links",
            "",
            f"The reference model ({model['moe_layers']} layers of {model['experts'][0]} experts,"
            f" K = {model['top_k']}) in float32, experts on disk. **The links are simulated**:"
            f" each rank has one of its own, on which a record takes {result['miss_ms']:g} ms,"
            f" one record after the other. One rank and {ranks} ranks, each on"
            f" {result['threads_per_rank']} thread, run on the same machine in {turns} turns,"
            " loaded, compiled and warmed up before. Times are wall time per token of"
            f" `generate`, {result['tokens_timed']} tokens a turn, without the first"
            f" {SKIPPED + 1}. A ratio is of one turn; given are the median over the turns, and"
            " their range.",
            "",
            *said,
            "",
            *markdown_table(HEAD, _body(result)).splitlines(),
            "",
            "`python -m benchmarks ranks` measures and writes this page"
            f" ([data](../../benchmarks/results/ranks_cpu.json)). {machine['cpu']},"
            f" {machine['cores']} cores; commit {(result['commit'] or 'unknown')[:12]}.",
            "",
        ]
    )


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
