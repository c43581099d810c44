"""One table of specmoe and FreeToken on one GPU: rows of `gpu_token` and of FreeToken's runs.

    python -m benchmarks peers_gpu --out peers_gpu.json --lease A --commit 7b47442 \\
        --specmoe token_bf16.json token_nvfp4.json --freetoken freetoken.jsonl
    python -m benchmarks peers_gpu --out peers_gpu.json --table --plot peers_gpu.png

Each call adds the rows that one lease of a machine measured, and `--table` prints all of them as
Markdown, a cell a line; a star marks a ratio across leases. Rows that are there already are kept
unless the same one comes again. FreeToken's file has a JSON object a line, as a driver of its
engine writes it: model, strategy (`offload` with a `rate`, or `fused`: all resident), context,
routing, tpot, p20, p80 and ttft in milliseconds, cache_GB, hit, reserved_GB, rss_GB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_size.peers_plot import draw
from benchmarks.kit.command import run_parser
from specmoe_compile.system.output import USER_ERRORS, sentence, write_json

Row = dict[str, Any]
Cell = tuple[str, str, int, int]

FREETOKEN_MODELS = {
    "qwen_bf16": ("Qwen3-30B-A3B", "bf16"),
    "qwen_fp8": ("Qwen3-30B-A3B", "fp8"),
    "qwen_nvfp4": ("Qwen3-30B-A3B", "nvfp4"),
    "gptoss_mxfp4": ("GPT-OSS-20B", "mxfp4"),
}
PER_CENT = {"resident": 100}
GATHER_GBPS = 51.0
"""What kernels read of page-locked host memory over PCIe 5 (docs/results/gpu_kernels.md)."""
HEAD = ("model, format", "context", "cache", "FreeToken", "specmoe, cache alone", "with prefetch")
RATIO = "specmoe's best / FreeToken"


def specmoe_rows(result: dict[str, Any], lease: str, commit: str) -> Iterator[Row]:
    """Rows of a file of `gpu_token`, first tokens in those of the same model and context."""
    cells = {k: v for k, v in result["rows"].items() if "wall_ms" in v}
    largest: dict[Any, int] = {}
    for key, row in cells.items():
        graph = (key.split("|")[1], row["gpu_bytes"])
        largest[graph] = max(largest.get(graph, 0), row["slots_bytes"])
    for key, row in cells.items():
        name, context, arm, _ = key.split("|")
        first = result["rows"].get(f"first_token|{name}|{context}", {})
        model, form = _shape(name)
        # Arms that share a graph share the slots of the largest of them.
        unused = largest[context, row["gpu_bytes"]] - row["slots_bytes"]
        yield {
            "system": "specmoe",
            "arm": arm,
            "model": model,
            "format": form,
            "context": int(context),
            "routing": "trace",
            "cache_bytes": row["slots_bytes"],
            "tpot_ms": row["wall_ms"],
            "device_ms": row["device_ms"],
            "ttft_ms": 1e3 * first["first_token_s"] if "first_token_s" in first else None,
            "gpu_bytes": None if row["gpu_bytes"] is None else row["gpu_bytes"] - unused,
            "host_bytes": row["store_bytes"],
            "hit_rate": row["hit_rate"],
            "missed_bytes": row["missed_bytes_per_token"],
            "prefetch_records": row["prefetch_records"],
            "tokens": row["tokens_timed"],
            "lease": lease,
            "commit": commit,
        }


def _shape(name: str) -> tuple[str, str]:
    for form in ("nvfp4", "mxfp4", "fp8", "int4"):
        if name.endswith(f"-{form}"):
            return name[: -len(form) - 1], form
    return name, "bf16"


def freetoken_rows(lines: str, lease: str) -> Iterator[Row]:
    """Rows of FreeToken's runs."""
    for line in lines.splitlines():
        row = json.loads(line)
        model, form = FREETOKEN_MODELS[row["model"]]
        resident = row["strategy"] == "fused"
        common = {
            "system": "freetoken",
            "arm": "resident" if resident else f"{row['strategy']}_{round(100 * row['rate'])}",
            "model": model,
            "format": form,
            "context": row["context"],
            "routing": row.get("routing", "trace"),
            "lease": lease,
        }
        if "error" in row:
            yield {**common, "not_run": row["error"]}
            continue
        yield {
            **common,
            "cache_bytes": None if resident else round(1e9 * row["cache_GB"]),
            "tpot_ms": {"p20": row["p20"], "p50": row["tpot"], "p80": row["p80"]},
            "device_ms": None,
            "ttft_ms": row["ttft"],
            "gpu_bytes": round(1e9 * row["reserved_GB"]),
            "host_bytes": round(1e9 * row["rss_GB"]),
            "hit_rate": row["hit"],
            "tokens": row["n"],
        }


def add_rows(result: dict[str, Any], rows: Sequence[Row]) -> None:
    """Put rows into a result; one of the same system, cell and lease is replaced."""
    names = ("system", "arm", "model", "format", "context", "routing", "lease")
    kept = {tuple(row[name] for name in names): row for row in result["rows"]}
    kept.update({tuple(row[name] for name in names): row for row in rows})
    result["rows"] = list(kept.values())


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, a cell a line: milliseconds per token, median (p20 to p80), and the lease."""
    cells: dict[Cell, dict[str, list[Row]]] = {}
    for row in rows:
        if "tpot_ms" not in row or row["arm"].startswith("lru"):
            continue
        cell = (row["model"], row["format"], row["context"], _per_cent(row["arm"]))
        cells.setdefault(cell, {}).setdefault(_column(row), []).append(row)
    lines = [f"| {' | '.join((*HEAD, RATIO))} |", f"|{'---|' * (len(HEAD) + 1)}"]
    for cell in sorted(cells, key=lambda c: (c[0] != "Qwen3-30B-A3B", c[1], c[2], c[3])):
        lines.append(f"| {' | '.join(_line(cell, cells[cell]))} |")
    return lines


def predicted_ms(rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
    """Rows of specmoe's caches alone, each with its time by the simplest rule.

    All experts resident, plus the missed bytes at the rate at which kernels read host memory.
    """
    ours = [row for row in rows if row["system"] == "specmoe"]
    places = ("model", "format", "context", "lease")
    whole = {tuple(r[p] for p in places): r for r in ours if r["arm"] == "resident"}
    for row in ours:
        resident = whole.get(tuple(row[p] for p in places))
        if resident is not None and row["arm"].startswith("cache_"):
            fetching_ms = row["missed_bytes"] / GATHER_GBPS / 1e6
            yield row, resident["tpot_ms"]["p50"] + fetching_ms


def _per_cent(arm: str) -> int:
    return PER_CENT.get(arm) or int(arm.rsplit("_", 1)[1])


def _column(row: Row) -> str:
    if row["system"] == "freetoken":
        return "freetoken"
    return "prefetch" if row["arm"].startswith("specmoe") else "cache"


def _line(cell: Cell, found: dict[str, list[Row]]) -> Iterator[str]:
    model, form, context, per_cent = cell
    held = [row["cache_bytes"] for rows in found.values() for row in rows if row["cache_bytes"]]
    yield f"{model}, {form}"
    yield f"{context}"
    yield f"{per_cent} %, {held[0] / 1e9:.1f} GB" if held else f"{per_cent} %"
    for column in ("freetoken", "cache", "prefetch"):
        rows = found.get(column, [])
        yield "; ".join(f"{_times(row['tpot_ms'])} {row['lease']}" for row in rows) or "-"
    ratios = list(_ratios(found))
    yield "; ".join(ratios) or "-"


def _times(tpot: dict[str, float]) -> str:
    return f"{tpot['p50']:.2f} ({tpot['p20']:.2f} to {tpot['p80']:.2f})"


def _ratios(found: dict[str, list[Row]]) -> Iterator[str]:
    """In each lease that has both; else across leases, which a star marks."""
    ours = [*found.get("cache", []), *found.get("prefetch", [])]
    theirs = found.get("freetoken", [])
    shared = {row["lease"] for row in ours} & {row["lease"] for row in theirs}
    for lease in sorted(shared) or ([""] if ours and theirs else []):
        mine, rival = (
            min(r["tpot_ms"]["p50"] for r in rows if lease in ("", r["lease"]))
            for rows in (ours, theirs)
        )
        yield f"{mine / rival:.2f}{'' if lease else '*'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Add rows, or print the table; returns the exit status."""
    parser = run_parser("peers_gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all rows")
    parser.add_argument("--lease", help="a name for the lease of the machine")
    parser.add_argument("--commit", help="of specmoe in that lease")
    parser.add_argument("--specmoe", type=Path, nargs="*", default=[], help="files of gpu_token")
    parser.add_argument("--freetoken", type=Path, nargs="*", default=[], help="files of FreeToken")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    args = parser.parse_args(arguments)
    try:
        _collect(args)
    except (*USER_ERRORS, KeyError) as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0


def _collect(args: Any) -> None:
    exists = args.out.exists()
    result = json.loads(args.out.read_text(encoding="utf-8")) if exists else {}
    for path in args.specmoe:
        if args.lease is None or args.commit is None:
            raise ValueError("--specmoe needs --lease and --commit, which the rows will name.")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not result:
            head = {"machine": found["machine"], "versions": found["versions"]}
            result = {"schema": 1, "commits": [], **head, "rows": []}
        if found["versions"] != result["versions"]:
            raise ValueError(f"{path} was measured with other versions: give another --out.")
        if args.commit not in result["commits"]:
            result["commits"].append(args.commit)
        add_rows(result, list(specmoe_rows(found, args.lease, args.commit)))
    for path in args.freetoken:
        if args.lease is None or not result:
            raise ValueError("--freetoken needs --lease, and rows of specmoe in --out first.")
        add_rows(result, list(freetoken_rows(path.read_text(encoding="utf-8"), args.lease)))
    if args.specmoe or args.freetoken:
        write_json(args.out, result)
    if (args.table or args.plot) and not result:
        raise ValueError(f"{args.out} does not exist: give --specmoe and --freetoken first.")
    if args.plot:
        draw(result["rows"], args.plot)
    if args.table:
        print("\n".join(table(result["rows"])))
        for row, guess in predicted_ms(result["rows"]):
            cell = f"{row['model']}, {row['format']}, {row['context']}, {row['arm']} {row['lease']}"
            found = row["tpot_ms"]["p50"]
            print(f"{cell}: {found:.2f} ms, predicted {guess:.2f} ({guess / found - 1:+.1%})")
