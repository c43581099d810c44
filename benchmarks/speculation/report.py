"""Writes docs/results/log/speculation.md from the result files, and judges what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from benchmarks.kit.claims import Claim
from benchmarks.speculation.exact import BATCHES, CACHES, LOOKAHEAD, PREDICTORS
from benchmarks.speculation.report_paired import paired_claims, paired_section
from benchmarks.speculation.report_timing import (
    Result,
    timing_claims,
    timing_section,
)
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.system.sizes import format_bytes

EXPECTED_RECALL = (0.76, 0.83, 0.78, 0.79, 0.65, 0.65, 0.68)
"""Recall@4 with default vectors of the second to the last layer, as the design measured it."""
RECALL_TOLERANCE = 0.02
PASSES_SHARE = 0.15
FEWER_BYTES = 0.3
MOST_LOSS_NATS = 0.02

_PHASES = {
    "timing": "time per token",
    "paired": "time per token, arms in turns within one process",
    "exact": "tokens of policy exact",
    "eval": "recall by layer and fidelity of the policies on the model as trained",
    "eval_wide": "the same on the widened model",
    "compile": "compile time",
}


def write_report(
    found: Mapping[str, Result],
    path: Path,
) -> bool:
    """Write the document; returns whether every claim that could be judged holds.

    Args:
        found: result of each phase that there is: timing, paired, exact, compile, eval. What must
            hold about time is judged by `paired`, and by `timing` where there is no other.
        path: the document.

    Raises:
        FileNotFoundError: there is no result at all.
    """
    if not found:
        raise FileNotFoundError("There is no speculation_*.json: run the phases first.")
    claims: list[Claim] = []
    sections = [_head(found)]
    for name, judge, section in (
        ("exact", exact_claims, _exact_section),
        ("paired", paired_claims, paired_section),
        ("timing", timing_claims, timing_section),
        ("eval", eval_claims, _no_section),
        ("eval_wide", eval_claims, _no_section),
        ("compile", compile_claims, _compile_section),
    ):
        if name in found:
            if name != "timing" or "paired" not in found:
                claims += judge(found[name])
            sections.append(section(found[name]))
    rows = [(c.text, c.measured, "yes" if c.holds else "**no**") for c in claims]
    sections.insert(
        1, "## What must hold\n\n" + markdown_table(("claim", "measured", "holds"), rows)
    )
    missing = [text for name, text in _PHASES.items() if name not in found]
    if missing:
        sections.insert(2, "Not measured in this run: " + "; ".join(missing) + ".")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([*filter(None, sections), _NOTES]) + "\n", encoding="utf-8")
    for claim in claims:
        print(f"{'ok ' if claim.holds else 'NOT'} {claim.text}: {claim.measured}")
    return all(claim.holds for claim in claims)


def exact_claims(exact: Result) -> list[Claim]:
    """Tokens of policy exact, with every predictor."""
    rows = exact["rows"]
    worst = max(row["differing_tokens"] for row in rows)
    wanted = {(b, c, p or LOOKAHEAD) for b in BATCHES for c in CACHES for p in PREDICTORS}
    missing = wanted - {(row["batch"], row["kv_cache"], row["predictor"]) for row in rows}
    measured = f"{worst} of {rows[0]['tokens']} tokens differ in the worst of {len(rows)} runs"
    if missing:
        runs = ", ".join(f"batch {b} {c} {p}" for b, c, p in sorted(missing))
        measured += f"; not run: {runs}"
    idle = [row["predictor"] for row in rows if not row["prefetches"]]
    without = sorted(set(idle) - {"empty"})
    if without:
        measured += f"; nothing was prefetched with {', '.join(without)}"
    return [
        Claim(
            text="exact: with prefetch the tokens are the unmodified model's, batch 1 and 4, static"
            " and dynamic cache, and with a predictor that is wrong, random or empty",
            measured=measured,
            holds=worst == 0 and not missing and not without,
        )
    ]


def eval_claims(found: Result) -> list[Claim]:
    """Recall per layer; bytes and loss of the best threshold of policy default_vector."""
    experts = f"experts of {format_bytes(found['model']['bytes_per_expert'])}"
    got = [layer["recall"] for layer in found["layers"] if layer["recall"] is not None]
    least = [expected - RECALL_TOLERANCE for expected in EXPECTED_RECALL]
    claims = [
        Claim(
            text=f"recall@4 of the layers after the first, {experts}, is at least"
            f" {' '.join(f'{e:.2f}' for e in EXPECTED_RECALL)}, within {RECALL_TOLERANCE}",
            measured=" ".join(f"{value:.3f}" for value in got),
            holds=len(got) == len(least)
            and all(value >= bound for value, bound in zip(got, least, strict=True)),
        )
    ]
    exact = next(row for row in found["policies"] if row["policy"] == "exact")
    curve = [
        (
            row["name"],
            1 - row["bytes_per_token"] / exact["bytes_per_token"],
            row["loss_increase_nats"],
        )
        for row in found["policies"]
        if row["policy"] == "default_vector"
    ]
    text = (
        f"default_vector moves {100 * FEWER_BYTES:.0f} % fewer bytes than exact, {experts}, at a"
        f" loss increase of at most {MOST_LOSS_NATS} nats/byte, at some threshold"
    )
    within = [point for point in curve if point[2] <= MOST_LOSS_NATS]
    if not within:
        return [*claims, Claim(text=text, measured="at none of the thresholds", holds=False)]
    name, fewer, loss = max(within, key=lambda point: point[1])
    measured = f"{name}: {100 * fewer:.0f} % fewer, {loss:+.4f} nats/byte"
    return [*claims, Claim(text=text, measured=measured, holds=fewer >= FEWER_BYTES)]


def compile_claims(found: Result) -> list[Claim]:
    """What compiling takes longer with the passes, and the passes' own share of it."""
    without, both, own = (
        median(pair[name] for pair in found["pairs"])
        for name in ("without_s", "with_s", "passes_s")
    )
    return [
        Claim(
            text=f"the passes add at most {100 * PASSES_SHARE:.0f} % to compile time",
            measured=f"{100 * own / without:.1f} % ({own:.2f} s on {without:.1f} s)",
            holds=own <= PASSES_SHARE * without,
        ),
        Claim(
            text="the same, with Inductor's time for the nodes that they insert",
            measured=f"{100 * (both / without - 1):.1f} % ({without:.1f} -> {both:.1f} s)",
            holds=both <= (1 + PASSES_SHARE) * without,
        ),
    ]


def _head(found: Mapping[str, Result]) -> str:
    result = next(
        (found[n] for n in ("timing", "compile", "exact", "eval_wide") if n in found), None
    )
    result = result or next(iter(found.values()))
    model, machine = result["model"], result["machine"]
    made = [*found.values(), *found.get("exact", {}).get("rows", ())]
    commits = sorted({str(part["commit"])[:12] for part in made})
    names = ", ".join(f"{n} {v}" for n, v in result["versions"].items() if v is not None)
    return "\n".join(
        (
            "# Speculation, measured",
            "",
            "Written by `python -m benchmarks speculation` from"
            " `benchmarks/results/speculation_*`.",
            *(("What policies cost in output is in [fidelity](fidelity.md).",) * ("eval" in found)),
            "",
            f"- Model: the reference model in float32 with experts of"
            f" {format_bytes(model['bytes_per_expert'])}: {model['moe_layers']} MoE layers,"
            f" {model['experts'][0]} experts, top-{model['top_k']},"
            f" {model['expert_bytes'] / 1e6:.0f} MB of experts, on disk.",
            f"- Machine: {machine['cpu']}, {machine['cores']} cores,"
            f" {format_bytes(machine['ram_bytes'])} RAM, GPU:"
            f" {machine['gpu']['name'] if machine['gpu'] else 'none'}.",
            f"- Versions: {names}. Commit: {', '.join(commits)}.",
        )
    )


def _exact_section(exact: Result) -> str:
    places = sorted({row["store_filesystem"] for row in exact["rows"]})
    rows = [
        (
            row["predictor"],
            str(row["batch"]),
            row["kv_cache"],
            f"{row['differing_tokens']} of {row['tokens']}",
            "-" if row["recall"] is None else f"{100 * row['recall']:.1f} %",
            str(row["prefetches"]),
        )
        for row in exact["rows"]
    ]
    head = ("predictor", "batch", "cache", "tokens that differ", "recall", "prefetches")
    return (
        "## Policy exact against the unmodified model\n\n"
        + markdown_table(head, rows)
        + f"\n\nFloat32, expert cache {exact['expert_cache']}, expert store on a"
        f" {' or '.join(places)} file system, `auto_off` off, so that every layer"
        " step is predicted. `wrong` predicts experts that are not needed, `random` any, `empty`"
        " none."
    )


def _compile_section(found: Result) -> str:
    rows = [
        (f"{p['without_s']:.1f} s", f"{p['with_s']:.1f} s", f"{1e3 * p['passes_s']:.0f} ms")
        for p in found["pairs"]
    ]
    head = ("prefetch off", "prefetch on", "the passes themselves")
    return (
        "## Compile time, empty caches\n\n"
        + markdown_table(head, rows)
        + "\n\nPrefill and decode graph together. What `prefetch on` takes longer than the passes"
        " is Inductor's time for the nodes that they insert."
    )


def _no_section(found: Result) -> str:
    return ""


_NOTES = """## How to read this

- `on_demand` and `prefetch` have no cache, only buffers of two layers; `prefetch` is the setting of
  the paper (arXiv 2603.19289).
- A prefetch can hide reading behind computing, and no more than there is of either. On two cores
  the readers, the lookahead and the experts share the same cores; where reads take most of a token,
  a wrong guess delays a right one. `auto_off` reads only guesses that are right more often than
  not."""
