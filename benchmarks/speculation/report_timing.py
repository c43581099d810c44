"""The part of docs/results/log/speculation.md about time: claims and tables of phase `timing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.kit.claims import Claim
from benchmarks.kit.traffic import predicted_share, summed, traffic_cells
from benchmarks.speculation.report_paired import CACHE_FACTOR, HIDDEN_SHARE, SIZES
from specmoe_compile.bench.records import spread
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.system.sizes import format_bytes

AGAIN = "cache 50% again"
"""The same arm once more: what a difference between two arms has to be compared with."""

Result = Mapping[str, Any]


def timing_claims(timing: Result) -> list[Claim]:
    """Prefetch against on_demand, specmoe against the cache alone."""
    p50 = {arm["name"]: arm["tpot_ms"]["p50"] for arm in timing["arms"]}
    gain, most = p50["on_demand"] - p50["prefetch"], p50["resident"]
    claims = [
        Claim(
            text=f"without a cache, prefetch gains {100 * HIDDEN_SHARE:.0f} % or more of the"
            " compute time",
            measured=f"{gain:.1f} of {most:.1f} ms ({100 * gain / most:.0f} %;"
            f" {p50['on_demand']:.1f} -> {p50['prefetch']:.1f} ms,"
            f" {100 * gain / p50['on_demand']:.0f} % less)",
            holds=gain >= HIDDEN_SHARE * most,
        )
    ]
    for size in SIZES:
        cache, ours = p50[f"cache {size}"], p50[f"specmoe {size}"]
        claims.append(
            Claim(
                text=f"with a cache of {size}, specmoe takes at most {CACHE_FACTOR} x cache",
                measured=f"{ours / cache:.3f} x ({ours:.1f} and {cache:.1f} ms)",
                holds=ours <= CACHE_FACTOR * cache,
            )
        )
    return claims


def timing_section(timing: Result) -> str:
    arms, settings = timing["arms"], timing["settings"]
    p50 = {arm["name"]: arm["tpot_ms"]["p50"] for arm in arms}
    rows: list[Sequence[str]] = []
    for arm in arms:
        base = {"prefetch": "on_demand", "specmoe": "cache"}.get(arm["name"].split()[0])
        base = None if base is None else arm["name"].replace(arm["name"].split()[0], base)
        if arm["name"] == AGAIN:
            base = AGAIN.removesuffix(" again")
        rows.append(
            (
                arm["name"],
                f"{arm['tpot_ms']['p50']:.1f}",
                medians_text(arm["medians_ms"]),
                "-" if base is None else f"{p50[arm['name']] / p50[base]:.3f} x {base}",
                *_traffic(arm["totals"], timing["model"]["moe_layers"]),
            )
        )
    head = (
        "arm",
        "ms/token",
        "of each run",
        "against",
        "hits",
        "read on demand/token",
        "ahead/token",
        "of it useful",
        "stall/token",
        "steps predicted",
    )
    return (
        "## Time per token\n\n"
        + markdown_table(head, rows)
        + f"\n\n{settings['prompts']} prompts of {settings['prompt_tokens']} tokens,"
        f" {settings['new_tokens']} greedy tokens each, {settings['repeats']} repeats,"
        f" {settings['order']}, each in its own process; ms/token is the median over all tokens, a"
        " token's time its median over the repeats, which generate the same. An arm `again` is the"
        " same arm: how far two equal ones are apart in this run."
        " Ahead counts what was prefetched; a useful record was used by the step it was read for or"
        " a later one. Steps predicted: the share of layer steps in which `auto_off` let the"
        f" lookahead run. Commit: {str(timing['commit'])[:12]}.\n\n" + _link_section(timing)
    )


def medians_text(medians_ms: Sequence[float]) -> str:
    """Medians of the runs; of many, the 20th and 80th percentile."""
    if len(medians_ms) <= 6:
        return ", ".join(f"{ms:.1f}" for ms in medians_ms)
    found = spread(medians_ms)
    return f"{found['p20']:.1f} to {found['p80']:.1f}"


def _link_section(timing: Result) -> str:
    """How much of each arm's time the link was busy: what a prefetch could still fill."""
    layers = timing["model"]["moe_layers"]
    rows: list[Sequence[str]] = []
    for arm in timing["arms"]:
        totals = arm["totals"]
        tokens = sum(total["steps"] for total in totals) / layers
        read = sum(total["demand_bytes"] + total["speculative_bytes"] for total in totals)
        busy_ms = sum(total["read_busy_ms"] for total in totals) / tokens
        if not read:
            continue
        median_ms = arm["tpot_ms"]["p50"]
        rows.append(
            (
                arm["name"],
                format_bytes(round(read / tokens)),
                f"{read / tokens / busy_ms / 1e6:.2f} GB/s",
                f"{busy_ms:.1f} ms",
                f"{100 * busy_ms / median_ms:.0f} %",
                f"{max(0.0, median_ms - busy_ms):.1f} ms",
            )
        )
    head = ("arm", "read/token", "rate while reading", "reading", "of the token", "link idle")
    resident = next(a["tpot_ms"]["p50"] for a in timing["arms"] if a["name"] == "resident")
    return (
        "### Where a prefetch can gain\n\n"
        + markdown_table(head, rows)
        + f"\n\nComputing a token takes {resident:.1f} ms with everything in memory:"
        f" {resident / layers:.2f} ms per layer, the window between a prediction and its use."
        " A prefetch gains by reading while the link is idle, and only if the guess is right; a"
        " wrong one costs a whole read where the link is busy. Reading is the mean over all tokens,"
        " the time per token a median.\n\n" + "\n".join(_account(timing, size) for size in SIZES)
    )


def _account(timing: Result, size: str) -> str:
    """Where the time of specmoe differs from the cache's: bytes, waits and everything else."""
    arms = {arm["name"]: arm for arm in timing["arms"]}
    layers = timing["model"]["moe_layers"]
    cache, ours = arms[f"cache {size}"], arms[f"specmoe {size}"]
    before, after = (_per_token(arm["totals"], layers) for arm in (cache, ours))
    read, waits = (after[key] - before[key] for key in ("read_bytes", "stall_ms"))
    grown = ours["tpot_ms"]["p50"] - cache["tpot_ms"]["p50"]
    window_ms = arms["resident"]["tpot_ms"]["p50"] / layers
    record_ms = timing["model"]["bytes_per_expert"] / after["rate"] * 1e3
    return (
        f"- Cache of {size}: prediction changes what is read by {read / 2**20:+.1f} MiB per token"
        f" and the waits by {waits:+.1f} ms; the median token by {grown:+.1f} ms, so that"
        f" everything else (predicting, bookkeeping, products beside reads) changes it by"
        f" {grown - waits:+.1f} ms. A record takes {record_ms:.1f} ms at"
        f" {after['rate'] / 1e9:.2f} GB/s, the window before a layer is {window_ms:.1f} ms."
    )


def _per_token(totals: Sequence[Mapping[str, Any]], layers: int) -> dict[str, float]:
    """Bytes read and time waited per token, and bytes per second of reading."""
    total = summed(totals)
    tokens = total["steps"] / layers
    read = total["demand_bytes"] + total["speculative_bytes"]
    return {
        "read_bytes": read / tokens,
        "stall_ms": total["stall_ms"] / tokens,
        "rate": read / total["read_busy_ms"] * 1e3,
    }


def _traffic(totals: Sequence[Mapping[str, Any]], layers: int) -> tuple[str, ...]:
    """Hits, bytes and stalls per token over all runs of an arm."""
    if not totals:
        return ("-",) * 6
    total = summed(totals)
    return (
        f"{100 * total['hits'] / max(1, total['hits'] + total['misses']):.0f} %",
        *traffic_cells(total, layers),
        f"{100 * predicted_share(total):.0f} %",
    )
