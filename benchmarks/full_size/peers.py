"""One table of specmoe and its rivals on one GPU: rows of `gpu_token` and of the rivals' runs.

    python -m benchmarks peers_gpu --out peers_gpu.json --lease A --commit 7b47442 \\
        --specmoe token_bf16.json token_nvfp4.json --freetoken freetoken.jsonl --rivals llama.jsonl
    python -m benchmarks peers_gpu --out peers_gpu.json --table --plot peers_gpu.png

    python -m benchmarks peers_gpu --out peers_gpu.json --run --folder run --lease B \\
        --commit 7b47442 --cells qwen_4bit --llama-bench build/bin/llama-bench --budget-s 560

Each call adds the rows that one lease of a machine measured, and `--table` prints all of them as
Markdown, a cell a line; a star marks a ratio across leases. Rows that are there already are kept
unless the same one comes again. FreeToken's file has a JSON object a line, as a driver of its
engine writes it: model, strategy (`offload` with a `rate`, or `fused`: all resident), context,
routing, tpot, p20, p80 and ttft in milliseconds, cache_GB, hit, rss_GB, and reserved_GB if known.

`--run` measures the named cells, system by system, begins nothing that does not fit the budget, and
adds the rows of the folder. What the folder has is measured once: `--resume` goes on with the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_size import peers_run
from benchmarks.full_size.peers_plot import draw
from benchmarks.full_size.peers_run import CELLS
from benchmarks.full_size.peers_table import paper_table, predictions, table
from benchmarks.kit.command import run_parser
from specmoe_compile.system.output import USER_ERRORS, sentence, write_json

Row = dict[str, Any]
FREETOKEN_MODELS = {
    "qwen_bf16": ("Qwen3-30B-A3B", "bf16"),
    "qwen_fp8": ("Qwen3-30B-A3B", "fp8"),
    "qwen_nvfp4": ("Qwen3-30B-A3B", "nvfp4"),
    "gptoss_mxfp4": ("GPT-OSS-20B", "mxfp4"),
}


def specmoe_rows(result: dict[str, Any], lease: str, commit: str) -> Iterator[Row]:
    """Rows of a file of `gpu_token`, first tokens in those of the same model and context."""
    rows = {k: v for k, v in result["rows"].items() if "attended_context" in v or "wall_ms" in v}
    cells = {key: row for key, row in rows.items() if "wall_ms" in row}
    largest: dict[Any, int] = {}
    for key, row in cells.items():
        graph = (key.split("|")[1], row["gpu_bytes"])
        largest[graph] = max(largest.get(graph, 0), row["slots_bytes"])
    for key, row in rows.items():
        name, context, arm, _, *more = key.split("|")
        first = result["rows"].get(f"first_token|{name}|{context}", {})
        model, form = _shape(name)
        cell = {
            "system": "specmoe",
            "arm": f"{arm}_no_products" if "no products" in more else arm,
            "model": model,
            "format": form,
            "context": int(context),
            "routing": row.get("routing", "trace"),
            "lease": lease,
        }
        if key not in cells:
            yield {**cell, "not_run": row["not_run"]}
            continue
        # Arms that share a graph share the slots of the largest of them.
        unused = largest[context, row["gpu_bytes"]] - row["slots_bytes"]
        yield {
            **cell,
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
            "routing": {"skew": "uniform"}.get(row.get("routing"), "trace"),
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
            "gpu_bytes": round(1e9 * row["reserved_GB"]) if "reserved_GB" in row else None,
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


def rival_rows(lines: str, lease: str) -> Iterator[Row]:
    """Rows of `peers_llama` and `peers_accelerate`, which have the schema already."""
    for line in lines.splitlines():
        yield {**json.loads(line), "lease": lease}


def main(arguments: Sequence[str] | None = None) -> int:
    """Add rows, or print the table; returns the exit status."""
    parser = run_parser("peers_gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all rows")
    parser.add_argument("--lease", help="a name for the lease of the machine")
    parser.add_argument("--commit", help="of specmoe in that lease")
    parser.add_argument("--specmoe", type=Path, nargs="*", default=[], help="files of gpu_token")
    parser.add_argument("--freetoken", type=Path, nargs="*", default=[], help="files of FreeToken")
    parser.add_argument("--rivals", type=Path, nargs="*", default=[], help="of llama, accelerate")
    _add_run(parser)
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    args = parser.parse_args(arguments)
    try:
        if args.run:
            _run(args)
        _collect(args)
    except (*USER_ERRORS, KeyError) as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0


def _add_run(parser: Any) -> None:
    parser.add_argument("--run", action="store_true", help="measure first, with what follows")
    parser.add_argument("--resume", action="store_true", help="go on with a folder's rest")
    parser.add_argument("--folder", type=Path, help="where the systems' own files are kept")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 16384, 65536])
    parser.add_argument("--trace", type=Path, help="routing trace; recorded if absent")
    parser.add_argument("--llama-bench", type=Path, help="the program, built with CUDA")
    parser.add_argument("--gguf-folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--freetoken-driver", type=Path, help="a script that writes such lines")
    parser.add_argument("--freetoken-configs", type=Path, help="folder of model configurations")
    parser.add_argument("--freetoken-tables", type=Path, help="its routing tables")
    parser.add_argument("--budget-s", type=float, default=560.0, help="begin nothing after this")


def _run(args: Any) -> None:
    """Measure, and name what was measured to `_collect`."""
    if args.folder is None or args.lease is None or args.commit is None:
        raise ValueError("--run needs --folder, --lease and --commit.")
    driver = (args.freetoken_driver, args.freetoken_configs, args.freetoken_tables)
    if any(driver) and not all(driver):
        raise ValueError("--freetoken-driver needs --freetoken-configs and --freetoken-tables.")
    if not args.resume and any(args.folder.glob("*.json*")):
        raise ValueError(
            f"--folder {args.folder} has rows of an earlier call: give --resume to measure what"
            " they lack, or another --folder."
        )
    args.folder.mkdir(parents=True, exist_ok=True)
    args.trace = args.trace or args.folder / "trace.safetensors"
    peers_run.run(list(peers_run.pieces(args)), args.budget_s)
    for option, paths in peers_run.files_of(args.folder).items():
        getattr(args, option).extend(paths)


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
    for paths, read in ((args.freetoken, freetoken_rows), (args.rivals, rival_rows)):
        for path in paths:
            if args.lease is None or not result:
                raise ValueError(f"{path} needs --lease, and rows of specmoe in --out first.")
            add_rows(result, list(read(path.read_text(encoding="utf-8"), args.lease)))
    if args.specmoe or args.freetoken or args.rivals:
        write_json(args.out, result)
    if (args.table or args.plot) and not result:
        raise ValueError(f"{args.out} does not exist: give --specmoe and --freetoken first.")
    if args.plot:
        draw(result["rows"], args.plot)
    if args.table:
        rows = result["rows"]
        print("\n".join([*table(rows), *predictions(rows), *paper_table(rows)]))
