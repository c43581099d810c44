"""Writes docs/results/log/end_to_end.md from the result files, and judges what must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.end_to_end.tokens import token_claims
from benchmarks.kit.claims import Claim
from specmoe_compile.cli.tables import BENCH_HEAD, bench_rows, markdown_table
from specmoe_compile.system.sizes import format_bytes

DTYPES = ("float32", "bfloat16")
RSS_ALLOWANCE_BYTES = 700_000_000
ACCELERATE_FACTOR = 10.0
DISK_SHARE = 0.85
RESIDENT_FACTOR = 1.5
STARTUP_FACTOR = 0.5
README_START = "<!-- measured: written by python -m benchmarks end_to_end --only report -->"
README_END = "<!-- /measured -->"
README_LEAVES_OUT = ("p20..p80", "while reading", "stall/token")


def write_report(results: Path, report: Path) -> bool:
    """Write the document; returns whether every claim that could be judged holds.

    Raises:
        FileNotFoundError: there is no result at all.
    """
    found = {
        (phase, dtype): json.loads(path.read_text(encoding="utf-8"))
        for phase in ("timing", "tokens", "disk", "startup")
        for dtype in DTYPES
        if (path := results / f"end_to_end_{phase}_{dtype}.json").is_file()
    }
    if not found:
        raise FileNotFoundError(f"{results} has no end_to_end_*.json: run the phases first.")
    claims: list[Claim] = []
    parts = [_head(found)]
    for dtype in DTYPES:
        if (timing := found.get(("timing", dtype))) is not None:
            parts.append(_timing_section(timing, dtype))
            claims += timing_claims(timing, dtype)
        if (disk := found.get(("disk", dtype))) is not None:
            claims += disk_claims(disk, dtype)
        if (tokens := found.get(("tokens", dtype))) is not None:
            claims += token_claims(tokens, dtype)
        if (startup := found.get(("startup", dtype))) is not None:
            claims += startup_claims(startup, dtype)
    rows = [(c.text, c.measured, "yes" if c.holds else "**no**") for c in claims]
    parts.insert(1, "## What must hold\n\n" + markdown_table(("claim", "measured", "holds"), rows))
    parts += [_token_section(found), _startup_section(found), _NOTES]
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    for claim in claims:
        print(f"{'ok ' if claim.holds else 'NOT'} {claim.text}: {claim.measured}")
    return all(claim.holds for claim in claims)


def write_readme_section(results: Path, readme: Path) -> None:
    """Put the table of time per token between the marks in the README.

    Raises:
        ValueError: the marks are not there.
    """
    parts: list[str] = []
    for dtype in DTYPES:
        path = results / f"end_to_end_timing_{dtype}.json"
        if not path.is_file():
            continue
        timing = json.loads(path.read_text(encoding="utf-8"))
        keep = [name for name in BENCH_HEAD if name not in README_LEAVES_OUT]
        rows = [dict(zip(BENCH_HEAD, row, strict=True)) for row in bench_rows(timing["arms"])]
        model, machine = timing["model"], timing["machine"]
        parts.append(
            f"The demo's model in {dtype}, {model['expert_bytes'] / 1e6:.0f} MB of experts on"
            f" disk, {machine['cores']} cores ({machine['cpu']}), no GPU"
            f" ([data](benchmarks/results/{path.name})):\n\n"
            + markdown_table(keep, [[row[name] for name in keep] for row in rows])
        )
    if not parts:
        return
    parts.append(
        "`accelerate` is Hugging Face's disk offload, `eager` Hugging Face with everything in"
        " memory; `on_demand`, `cache` and `resident`\n"
        "are specmoe without a cache, with one of 25 %, and with everything in memory"
        " ([more](docs/results/end_to_end.md))."
    )
    text = readme.read_text(encoding="utf-8")
    start, end = text.find(README_START), text.find(README_END)
    if not 0 <= start < end:
        raise ValueError(f"{readme.name} has no marks {README_START} and {README_END}.")
    body = "\n\n".join(parts)
    readme.write_text(f"{text[:start]}{README_START}\n{body}\n{text[end:]}", encoding="utf-8")


def timing_claims(timing: Mapping[str, Any], dtype: str) -> list[Claim]:
    """Speed, bytes, bandwidth and memory."""
    arms = {arm["name"]: arm for arm in timing["arms"]}
    p50 = {name: arm["tpot_ms"]["p50"] for name, arm in arms.items()}
    claims = [
        Claim(
            text=f"{dtype}: every arm ran",
            measured="; ".join(f"{n}: {why}" for n, why in timing["failed"].items()) or "all",
            holds=not timing["failed"],
        )
    ]
    if {"cache", "accelerate"} <= arms.keys():
        factor = p50["accelerate"] / p50["cache"]
        claims.append(
            Claim(
                text=f"{dtype}: cache is at least {ACCELERATE_FACTOR:g} times faster than"
                " accelerate, both under the cap",
                measured=f"{factor:.1f} times ({p50['accelerate']:.0f} and {p50['cache']:.1f} ms)",
                holds=factor >= ACCELERATE_FACTOR
                and all(arms[n]["memory_cap_bytes"] is not None for n in ("cache", "accelerate")),
            )
        )
    if {"resident", "eager"} <= arms.keys():
        factor = p50["eager"] / p50["resident"]
        claims.append(
            Claim(
                text=f"{dtype}: resident is at least {RESIDENT_FACTOR:g} times faster than"
                " Hugging Face eager",
                measured=f"{factor:.2f} times ({p50['eager']:.1f} and {p50['resident']:.1f} ms)",
                holds=factor >= RESIDENT_FACTOR,
            )
        )
    if "on_demand" in arms:
        claims += _on_demand_claims(timing, arms["on_demand"], dtype)
    budget = timing["model"]["other_bytes"] + RSS_ALLOWANCE_BYTES
    for name in ("on_demand", "cache"):
        if name not in arms:
            continue
        arm = arms[name]
        peak = max(arm["peak_rss_bytes"], timing["pack"]["peak_rss_bytes"])
        allowed = budget + arm["fast_tier_bytes"]
        claims.append(
            Claim(
                text=f"{dtype}: peak RSS of {name} is at most other weights + cache + 700 MB,"
                " packing and loading included",
                measured=f"{peak / 1e6:.0f} MB of {allowed / 1e6:.0f} MB",
                holds=peak <= allowed,
            )
        )
    return claims


def _on_demand_claims(timing: Mapping[str, Any], arm: Mapping[str, Any], dtype: str) -> list[Claim]:
    top_k = timing["model"]["top_k"]
    per_step = max(
        layer["misses"] / layer["steps"] for run in arm["runs"] for layer in run["decode"]["layers"]
    )
    return [
        Claim(
            text=f"{dtype}: on_demand reads at most K experts per layer and token",
            measured=f"{per_step:.2f} of {top_k} in the busiest layer",
            holds=per_step <= top_k,
        )
    ]


def disk_claims(found: Mapping[str, Any], dtype: str) -> list[Claim]:
    """Each run of on_demand against the disk's mean rate before and after it; the median."""
    disk, ours = found["disk_gbps"], found["on_demand_waiting_gbps"]
    shares = [
        2 * rate / (before + after)
        for rate, before, after in zip(ours, disk, disk[1:], strict=False)
    ]
    share = median(shares)
    return [
        Claim(
            text=f"{dtype}: while on_demand waits, it reads at {100 * DISK_SHARE:.0f} % or more of"
            " the disk's bandwidth",
            measured=f"{100 * share:.0f} % ({', '.join(f'{100 * s:.0f}' for s in shares)};"
            f" on_demand {median(ours):.2f} GB/s, and"
            f" {median(found['on_demand_gbps']):.2f} over all time in which a read is in"
            f" progress, computing or not; disk {median(disk):.2f},"
            f" {min(disk):.2f} to {max(disk):.2f}, in turn: what doctor reads from the store)",
            holds=share >= DISK_SHARE,
        )
    ]


def startup_claims(startup: Mapping[str, Any], dtype: str) -> list[Claim]:
    """A second process finds the compiled code."""
    first, second = (
        median([pair[f"{process}_compile_s"] for pair in startup["pairs"]])
        for process in ("first", "second")
    )
    return [
        Claim(
            text=f"{dtype}: a second process compiles for less than half the first one's time",
            measured=f"{second:.1f} s after {first:.1f} s",
            holds=second < STARTUP_FACTOR * first,
        )
    ]


def _head(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    result = next(iter(found.values()))
    model, machine = result["model"], result["machine"]
    commits = sorted({str(r["commit"])[:12] for r in found.values()})
    loads = ", ".join(f"{r['load_average'][0]:.1f}" for r in found.values())
    names = ", ".join(f"{n} {v}" for n, v in result["versions"].items() if v is not None)
    return "\n".join(
        (
            "# End to end: the main job, measured",
            "",
            "Written by `python -m benchmarks end_to_end` from `benchmarks/results/end_to_end_*`.",
            "",
            f"- Model: the reference model with experts of {model['bytes_per_expert'] >> 20} MiB:"
            f" {model['moe_layers']} MoE layers, {model['experts'][0]} experts,"
            f" top-{model['top_k']}, {model['expert_bytes'] / 1e6:.0f} MB of experts.",
            f"- Machine: {machine['cpu']}, {machine['cores']} cores,"
            f" {format_bytes(machine['ram_bytes'])} RAM, {machine['system']},"
            f" GPU: {machine['gpu']['name'] if machine['gpu'] else 'none'}.",
            f"- Versions: {names}.",
            f"- Commit: {', '.join(commits)}. Load average at the end of each phase: {loads}.",
            # What whoever ran a phase has to say about it.
            *(
                f"- {phase}, {dtype}: {r['remark']}"
                for (phase, dtype), r in found.items()
                if "remark" in r
            ),
        )
    )


def _timing_section(timing: Mapping[str, Any], dtype: str) -> str:
    settings = timing["settings"]
    columns = [BENCH_HEAD, *bench_rows(timing["arms"])]
    rows = list(zip(*columns, strict=True))
    disk = timing["disk"]
    rates = ", ".join(
        f"{n} readers {disk['before']['gbps'][n]:.2f} and {disk['after']['gbps'][n]:.2f}"
        for n in disk["before"]["gbps"]
    )
    pack = timing["pack"]
    packed = (
        "was there already"
        if pack["reused"]
        else f"took {pack['seconds']:.1f} s and {format_bytes(pack['peak_rss_bytes'])} at most"
    )
    loads = "; ".join(
        f"{arm['name']} {min(run['load_s'] for run in arm['runs']):.1f}" for arm in timing["arms"]
    )
    return "\n".join(
        (
            f"## Time per token, {dtype}",
            "",
            markdown_table(rows[0], rows[1:]),
            "",
            f"{settings['new_tokens']} greedy tokens after a prompt of"
            f" {timing['prompts']['tokens']}, {settings['repeats']} repeats, arms interleaved, each"
            f" in its own process, after {settings['warmup_tokens']} tokens of warm-up; the first"
            f" {settings['skip_tokens']} intervals of a run are not counted. Expert cache"
            f" {settings['expert_cache']}.",
            f"Disk, measured before and after, GB/s in records of"
            f" {disk['before']['record_bytes'] >> 20} MiB: {rates}. Memory:"
            f" {disk['memory']['read_gbps']:.1f} GB/s read,"
            f" {disk['memory']['gemv_bfloat16_gbps']:.1f} bf16 GEMV,"
            f" {disk['memory']['gemv_float32_gbps']:.1f} fp32 GEMV.",
            f"Packing the store {packed}. Loading took, in seconds: {loads}.",
        )
    )


def _token_section(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    rows: list[Sequence[str]] = []
    for (phase, dtype), result in found.items():
        if phase != "tokens":
            continue
        for name, c in result["comparison"].items():
            margin = c["largest_margin_at_divergence"]
            median = c.get("median_logit_difference")  # results of an older commit lack it
            rows.append(
                (
                    dtype,
                    name,
                    f"{c['differing_tokens']} of {c['tokens']}",
                    f"{c['diverging_prompts']} of {c['prompts']}",
                    "-" if margin is None else f"{margin:.4f}",
                    "-" if median is None else f"{median:.2g}",
                    f"{c['largest_logit_difference']:.4g}",
                    f"{c['logit_range']:.1f}",
                )
            )
    if not rows:
        return ""
    head = (
        "dtype",
        "arm",
        "tokens that differ",
        "prompts that diverge",
        "largest margin there",
        "median logit difference",
        "largest",
        "range of logits",
    )
    return (
        "## Tokens and logits against the unmodified model\n\n"
        + markdown_table(head, rows)
        + "\n\nLogits are compared while both had the same text before them; a step's difference is"
        " that of its worst logit. The margin is the distance of the unmodified model's two best"
        " logits where a prompt first diverges: a near-tie, which another order of sums decides"
        " otherwise; all later tokens of that prompt count as different where they are."
    )


def _startup_section(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    rows = [
        (
            dtype,
            f"{pair['first_s']:.1f}",
            f"{pair['first_compile_s']:.1f}",
            f"{pair['second_s']:.1f}",
            f"{pair['second_compile_s']:.1f}",
        )
        for (phase, dtype), result in found.items()
        if phase == "startup"
        for pair in result["pairs"]
    ]
    if not rows:
        return ""
    head = ("dtype", "first process", "compiling", "second process", "compiling")
    return (
        "## Time to the first token, seconds from the start of the process\n\n"
        + markdown_table(head, rows)
        + "\n\nImports and loading included; the first process has empty compile caches, the"
        " second one finds what it left. Compiling counts the decode graph too, which is compiled"
        " after the first token."
    )


_NOTES = """## How to read this

- `accelerate` is Hugging Face `device_map` disk offload, untouched, with every decoder layer on
  disk. `accelerate_auto` is `device_map="auto"` with as much memory as specmoe's expert cache.
- The memory cap is a control group: the page cache and the compiler's processes count too. `eager`
  and `resident` hold all experts in memory and run without it.
- specmoe reads its store with O_DIRECT, past the page cache, so its reads are cold by construction.
  accelerate reads through the page cache, warm from loading, as far as the cap leaves room; the
  checkpoint's pages are dropped from it before every run, so that they count against the cap.
- Peak RSS is that of the measuring process, with the shared libraries of Python and PyTorch;
  hits, reads and stalls count decoding only. "While reading" is bytes read over the time in which
  at least one read was in progress; a stall is time in which there was nothing else to do. While it
  waits: of each read, the share of its bytes that its time in stalls is of its whole time, over the
  stalls' time."""
