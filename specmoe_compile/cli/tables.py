"""Tables that commands print, and that the documents show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specmoe_compile.system.sizes import format_bytes

Row = tuple[str, ...]

BENCH_HEAD: Row = (
    "arm",
    "ms/token",
    "p20..p80",
    "speed",
    "first token",
    "hits",
    "read/token",
    "stall/token",
    "while reading",
    "peak RSS",
    "cap",
    "tokens",
)


def bench_rows(arms: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per arm; speed is against the first arm, tokens against the reference.

    The reference for tokens is the arm `eager` if there is one, else the first arm.
    """
    if not arms:
        return []
    base_ms = arms[0]["tpot_ms"]["p50"]
    reference = next((arm for arm in arms if arm["name"] == "eager"), arms[0])
    return [_bench_row(arm, base_ms, reference) for arm in arms]


def _bench_row(arm: Mapping[str, Any], base_ms: float, reference: Mapping[str, Any]) -> Row:
    tpot = arm["tpot_ms"]
    decoded = arm["timed_tokens"] - arm["repeats"] * len(arm["tokens"])
    read, stall = arm["demand_bytes"], arm["stall_ms"]
    gbps = arm.get("read_gbps")  # results of an older commit lack it
    cap = arm["memory_cap_bytes"]
    return (
        arm["name"],
        f"{tpot['p50']:.1f}",
        f"{tpot['p20']:.1f}..{tpot['p80']:.1f}",
        f"{base_ms / tpot['p50']:.2f}x",
        f"{arm['ttft_ms']:.0f} ms",
        "-" if arm["hit_rate"] is None else f"{100 * arm['hit_rate']:.1f} %",
        "-" if read is None else format_bytes(round(read / max(1, decoded))),
        "-" if stall is None else f"{stall / max(1, decoded):.1f} ms",
        "-" if not gbps else f"{gbps:.2f} GB/s",
        format_bytes(arm["peak_rss_bytes"]),
        "-" if cap is None else format_bytes(cap),
        _token_verdict(arm, reference),
    )


def _token_verdict(arm: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    if arm["tokens_sha256"] is None:
        return "differ between repeats"
    if arm is reference:
        return "reference"
    if arm["tokens_sha256"] == reference["tokens_sha256"]:
        return "same"
    differing = count_differing(arm["tokens"], reference["tokens"])
    if differing:
        return f"{differing} differ"
    return f"same ({min(_longest(arm), _longest(reference))})"


def _longest(arm: Mapping[str, Any]) -> int:
    return max(len(row) for row in arm["tokens"])


def count_differing(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> int:
    """Number of places where two generations of the same prompts have different tokens.

    Where one generation is longer, its first tokens are compared.
    """
    return sum(a != b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=False))


def print_bench(arms: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> None:
    """Print the model and a table with one column per arm."""
    print(
        f"{model['name']}, {model['dtype']}: {model['moe_layers']} MoE layers,"
        f" top-{model['top_k']}, {format_bytes(model['expert_bytes'])} of experts"
    )
    head, *rows = zip(BENCH_HEAD, *bench_rows(arms), strict=True)
    print_table(head, rows, keys=1)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int) -> None:
    """Print a table to standard output without cutting anything off.

    On a terminal that is too narrow, as several tables that each begin with the first `keys`
    columns; in a pipe or a file, in full width.
    """
    from rich.console import Console
    from rich.table import Table

    widths = [max(map(len, column)) + 3 for column in zip(head, *rows, strict=True)]
    console = Console()
    width = console.width if console.is_terminal else sum(widths) + 1
    for columns in _column_groups(widths, width - 1, keys):
        table = Table()
        for column in columns:
            table.add_column(head[column], justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        Console(width=max(width, sum(widths[c] for c in columns) + 1)).print(table)


def _column_groups(widths: Sequence[int], available: int, keys: int) -> list[list[int]]:
    """Columns of each table: the keys, and as many others as fit, one at least."""
    groups: list[list[int]] = []
    used = 0
    for column in range(keys, len(widths)):
        if not groups or used + widths[column] > available:
            groups.append(list(range(keys)))
            used = sum(widths[:keys])
        groups[-1].append(column)
        used += widths[column]
    return groups


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a document."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
