"""Tables of `peers_gpu`: all systems beside each other, what is predicted, and the paper's setting.

A star marks a ratio across leases. A rival's 4-bit format stands in the cell of specmoe's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]
Cell = tuple[str, str, int, str, str]

GATHER_GBPS = 51.0
"""What kernels read of page-locked host memory over PCIe 5 (docs/results/gpu_kernels.md)."""
RIVALS = {"freetoken": "FreeToken", "llama.cpp": "llama.cpp", "accelerate": "accelerate"}
COLUMNS = {**RIVALS, "cache": "specmoe, cache alone", "prefetch": "with prefetch"}
RATIO = "specmoe's best / best rival"
SAME_CELL = {"q4_0": "nvfp4", "q8_0": "fp8"}
"""Formats of as many bits that systems without the other one have."""
NO_CACHE = ("on_demand", "prefetch_no_cache")
PAPER_HEAD = (
    "model, format",
    "context",
    "on demand",
    "with prefetch",
    "saved",
    "could be hidden",
    "of which is",
)


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, a cell a line: milliseconds per token, median (p20 to p80), and the lease.

    What was not run says why in its place.
    """
    cells: dict[Cell, dict[str, list[Row]]] = {}
    for row in rows:
        if not row["arm"].startswith(("lru", *NO_CACHE)):
            cells.setdefault(cell_of(row), {}).setdefault(_column(row), []).append(row)
    columns = [name for name in COLUMNS if any(name in found for found in cells.values())]
    head = ["model, format", "context", "cache", *(COLUMNS[name] for name in columns), RATIO]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for cell in sorted(cells, key=_order):
        lines.append(f"| {' | '.join(_line(cell, cells[cell], columns))} |")
    return lines


def cell_of(row: Row) -> Cell:
    """Model, format, context, routing, and what of the experts is in GPU memory."""
    routing = "uniform" if row["routing"] == "uniform" else "trace"
    form = str(row["format"])
    return row["model"], SAME_CELL.get(form, form), row["context"], routing, _place(row["arm"])


def _place(arm: str) -> str:
    """`25 %`, or `8 GiB card`."""
    name = arm.removesuffix("_no_products")
    if name == "resident":
        return "100 %"
    size = name.rsplit("_", 1)[1]
    return f"{size[:-2]} GiB card" if size.endswith("gb") else f"{int(size)} %"


def _order(cell: Cell) -> tuple[Any, ...]:
    model, form, context, routing, place = cell
    number, unit = place.split(" ", 1)
    return model != "Qwen3-30B-A3B", model, form, context, routing, unit, int(number)


def _column(row: Row) -> str:
    if row["system"] != "specmoe":
        return str(row["system"])
    return "prefetch" if row["arm"].startswith("specmoe") else "cache"


def _line(cell: Cell, found: dict[str, list[Row]], columns: Sequence[str]) -> Iterator[str]:
    model, form, context, routing, place = cell
    first = [row for name in ("cache", "prefetch", *RIVALS) for row in found.get(name, [])]
    held = next((row["cache_bytes"] for row in first if row.get("cache_bytes")), None)
    yield f"{model}, {form}" + (", near-uniform routing" if routing == "uniform" else "")
    yield f"{context}"
    yield place if held is None else f"{place}, {held / 1e9:.1f} GB"
    for column in columns:
        shown = (_shown(row, form) for row in found.get(column, []))
        yield "; ".join(shown) or "-"
    yield "; ".join(_ratios(found)) or "-"


def _shown(row: Row, form: str) -> str:
    if "tpot_ms" not in row:
        return f"not run: {row['not_run'].rstrip('.')} {row['lease']}"
    other = "" if row["format"] == form else f"{row['format']}: "
    products = ", without products" if row["arm"].endswith("_no_products") else ""
    return f"{other}{_times(row)}{products} {row['lease']}"


def _times(row: Row) -> str:
    tpot = row["tpot_ms"]
    if tpot["p20"] is None:  # it times runs, not tokens
        return f"{tpot['p50']:.2f} (runs {min(row['runs_ms']):.2f} to {max(row['runs_ms']):.2f})"
    return f"{tpot['p50']:.2f} ({tpot['p20']:.2f} to {tpot['p80']:.2f})"


def _ratios(found: dict[str, list[Row]]) -> Iterator[str]:
    """In each lease that has both; else across leases, which a star marks."""
    timed = {name: [r for r in rows if "tpot_ms" in r] for name, rows in found.items()}
    ours = [*timed.get("cache", []), *timed.get("prefetch", [])]
    theirs = [row for name in RIVALS for row in timed.get(name, [])]
    shared = {row["lease"] for row in ours} & {row["lease"] for row in theirs}
    for lease in sorted(shared) or ([""] if ours and theirs else []):
        mine, rival = (
            min(r["tpot_ms"]["p50"] for r in rows if lease in ("", r["lease"]))
            for rows in (ours, theirs)
        )
        yield f"{mine / rival:.2f}{'' if lease else '*'}"


def _resident_of(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """specmoe's rows, each with the one of its lease and cell that has all experts resident."""
    ours = [row for row in rows if row["system"] == "specmoe" and "tpot_ms" in row]
    places = ("model", "format", "context", "lease")
    whole = {tuple(r[p] for p in places): r for r in ours if r["arm"] == "resident"}
    for row in ours:
        resident = whole.get(tuple(row[p] for p in places))
        if resident is not None:
            yield row, resident


def predicted_ms(rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
    """Rows of specmoe's caches alone, each with its time by the simplest rule.

    All experts resident, plus the missed bytes at the rate at which kernels read host memory.
    """
    for row, resident in _resident_of(rows):
        if row["arm"].startswith("cache_"):
            fetching_ms = row["missed_bytes"] / GATHER_GBPS / 1e6
            yield row, resident["tpot_ms"]["p50"] + fetching_ms


def predictions(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row that is predicted."""
    for row, guess in predicted_ms(rows):
        cell = f"{row['model']}, {row['format']}, {row['context']}, {row['arm']} {row['lease']}"
        found = row["tpot_ms"]["p50"]
        yield f"{cell}: {found:.2f} ms, predicted {guess:.2f} ({guess / found - 1:+.1%})"


def paper_table(rows: Sequence[Row]) -> list[str]:
    """Without a cache: what prefetching saves of what the rest of a token can hide.

    No more can be hidden than the shorter of fetching and the rest, which is a token's time with
    all experts resident; empty if no lease has all three arms.
    """
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row, resident in _resident_of(rows):
        if row["arm"].startswith(NO_CACHE):
            key = (row["model"], row["format"], row["context"], row["lease"])
            arms = found.setdefault(key, {"resident": resident})
            # Of several numbers of records that are fetched ahead, the best.
            name = next(name for name in NO_CACHE if row["arm"].startswith(name))
            arms[name] = min(row, arms.get(name, row), key=lambda r: r["tpot_ms"]["p50"])
    lines = []
    for (model, form, context, lease), arms in sorted(found.items()):
        if len(arms) == 3:
            rest, demand, ahead = (arms[name]["tpot_ms"]["p50"] for name in ("resident", *NO_CACHE))
            hidable = min(rest, max(0.0, demand - rest))
            cells = [f"{model}, {form}", f"{context}", f"{demand:.2f} {lease}", f"{ahead:.2f}"]
            cells += [f"{1 - ahead / demand:.0%}", f"{hidable / demand:.0%}"]
            lines.append(f"| {' | '.join([*cells, f'{(demand - ahead) / hidable:.0%}'])} |")
    head = [f"| {' | '.join(PAPER_HEAD)} |", f"|{'---|' * len(PAPER_HEAD)}"]
    return [*head, *lines] if lines else []
