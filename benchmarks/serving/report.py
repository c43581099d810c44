"""docs/results/serving.md from the benchmark's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HOW = (
    "python -m benchmarks serving specmoe_compile/reference_model/checkpoint --threads 1"
    " --out serving.json"
)


def page(found: Mapping[str, Any]) -> str:
    """The page; phases that were not measured have no line."""
    lines = [
        "# What `specmoe serve` costs",
        "",
        "`generate` alone beside the same tokens through the server, in turns in one process, with"
        " caches of one length. The model is the package's reference model, whose short tokens make"
        " a server look dear. One thread computes, so that the client has a core of its own.",
        "",
        f"`{_HOW} --phase cost load second_turn` measures, `--page` writes this page"
        " ([data](../../benchmarks/results/serving.json)). The client is the real `openai` package,"
        " in a process of its own on the same machine; greedy answers.",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    for phase, rows in (("cost", _cost), ("load", _load), ("second_turn", _second_turn)):
        if phase in found:
            lines += [f"| {what} | {measured} |" for what, measured in rows(found[phase])]
    lines += ["", "Where and how:", ""]
    lines += [f"- {name}: {_where(phase)}" for name, phase in found.items() if name != "schema"]
    return "\n".join(lines) + "\n"


def _cost(phase: Mapping[str, Any]) -> list[tuple[str, str]]:
    tpot = phase["tpot_ms"]
    ratios = phase["over_alone"]
    return [
        ("time per token, `generate` alone", f"{tpot['alone']:.2f} ms"),
        (
            f"the same, streamed by the server (median of {len(phase['turns_ms']['alone'])} turns"
            f" of {phase['tokens']} tokens, each between two of `generate` alone)",
            f"{_ratio(ratios['served'])} of it",
        ),
        ("the same, `generate` alone once more: noise", f"{_ratio(ratios['alone_again'])} of it"),
    ]


def _load(phase: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {0: "`generate` alone", 1: "1 client", 4: "4 clients", 8: "8 clients"}
    return [
        (
            f"tokens per second, reading the prompt included: {names[row['clients']]}",
            f"{row['tokens_per_s']:.1f} ({min(row['turns']):.1f} to {max(row['turns']):.1f})",
        )
        for row in phase["rows"]
    ]


def _second_turn(phase: Mapping[str, Any]) -> list[tuple[str, str]]:
    tokens = phase["tokens"]
    ttft = phase["ttft_ms"]
    new = tokens["prompt"] - tokens["history"]
    return [
        (
            f"time to first token, {tokens['history']} tokens of history and {new} new: cold",
            f"{ttft['not_kept']:.0f} ms",
        ),
        ("the same, the history's keys and values kept", f"{ttft['kept']:.0f} ms"),
        ("from the command to `Ready`", f"{phase['ready_s']:.1f} s"),
    ]


def _ratio(value: Mapping[str, float]) -> str:
    return f"{value['median']:.3f} +- {value['error']:.3f}"


def _where(phase: Mapping[str, Any]) -> str:
    machine, versions, settings = phase["machine"], phase["versions"], phase["settings"]
    given = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    return (
        f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, transformers"
        f" {versions['transformers']}; {given}; commit {phase['commit'][:12]}"
    )
