"""The part of docs/results/log/speculation.md about time: phase `paired`, claims and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.kit.claims import Claim
from benchmarks.kit.paired import ratio
from benchmarks.kit.traffic import TRAFFIC_HEAD, predicted_share, summed, traffic_cells
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.system.sizes import format_bytes

HIDDEN_SHARE = 0.8
CACHE_FACTOR = 1.02
NO_CACHE = "no cache"
SIZES = ("25%", "50%")

Result = Mapping[str, Any]


def paired_claims(paired: Result) -> list[Claim]:
    """Prefetch against on_demand, specmoe against the cache alone."""
    turns = {name: arm["turns_ms"] for name, arm in paired["groups"][NO_CACHE]["arms"].items()}
    gain = _median_gain(turns["on_demand"], turns["prefetch"])
    most = median(turns["resident"])
    base = median(turns["on_demand"])
    claims = [
        Claim(
            text=f"without a cache, prefetch gains {100 * HIDDEN_SHARE:.0f} % or more of the"
            " compute time",
            measured=f"{gain:.1f} of {most:.1f} ms ({100 * gain / most:.0f} %;"
            f" {100 * gain / base:.0f} % of {base:.1f} ms)",
            holds=gain >= HIDDEN_SHARE * most,
        )
    ]
    for size in SIZES:
        arms = paired["groups"][size]["arms"]
        found = ratio(arms["specmoe"]["turns_ms"], arms["cache"]["turns_ms"])
        same = ratio(arms["cache again"]["turns_ms"], arms["cache"]["turns_ms"])
        claims.append(
            Claim(
                text=f"with a cache of {size}, specmoe takes at most {CACHE_FACTOR} x cache",
                measured=f"{found} x (the same arm twice: {same})",
                holds=found.mean <= CACHE_FACTOR,
            )
        )
    return claims


def _median_gain(base_ms: Sequence[float], ours_ms: Sequence[float]) -> float:
    return median(base - ours for base, ours in zip(base_ms, ours_ms, strict=True))


def paired_section(paired: Result) -> str:
    layers = paired["model"]["moe_layers"]
    rows: list[Sequence[str]] = []
    for group, found in paired["groups"].items():
        arms = found["arms"]
        base = next(iter(arms))
        for name, arm in arms.items():
            rows.append(
                (
                    group if name == base else "",
                    name,
                    f"{arm['tpot_ms']['p50']:.1f}",
                    "-" if name == base else str(ratio(arm["turns_ms"], arms[base]["turns_ms"])),
                    *_traffic(arm["totals"], layers),
                )
            )
    times = ("cache", "arm", "ms/token", "x the first of its group")
    head = (*times, *TRAFFIC_HEAD, "pushed out/token", "predicted")
    settings = paired["settings"]
    different = sum(found["different_token_lists"] for found in paired["groups"].values())
    same = "the same in all arms of a group" if not different else f"**{different} arms differ**"
    return (
        "## Time per token, arms in turns within one process\n\n"
        + markdown_table(head, rows)
        + f"\n\n{settings['prompts']} prompts of {settings['prompt_tokens']} tokens,"
        f" {settings['new_tokens']} greedy tokens each, {settings['rounds']} rounds, back and"
        " forth; a turn is one prompt, its first tokens are left out. A ratio is the mean over"
        " turns of the medians' ratio, with its standard error. The arms of a group live in one"
        " process, so that neither the machine's drift nor a process that is slow for life counts."
        " An arm `again` is the same arm with memory of its own: how far two equal ones are apart."
        " Pushed out: read again because a useless guess had taken the slot. Predicted: the share"
        " of layer steps in which `auto_off` let the lookahead run."
        f" Tokens: {same}. Commit: {str(paired['commit'])[:12]}."
    )


def _traffic(totals: Sequence[Mapping[str, Any]], layers: int) -> tuple[str, ...]:
    total = summed(totals)
    return (
        *traffic_cells(total, layers),
        format_bytes(round(total["pushed_out_bytes"] * layers / total["steps"])),
        f"{100 * predicted_share(total):.0f} %",
    )
