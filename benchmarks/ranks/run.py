"""Two CPU ranks beside one, each behind a simulated link of the same rate: time per token.

    python -m benchmarks ranks [--out FILE] [--page FILE] [--store-dir FOLDER] [--dry]

The reference model in float32, experts on disk; each rank's reads pass a link of its own that takes
as long for a record as is asked for (`--miss-ms`). One rank and N ranks, each on one thread, are
loaded, compiled and warmed up before anything is timed, and then generate the same tokens in turns.
N ranks with the same slots per rank have N times the links and N times the cache; where the slots
of all together are one rank's, they have N times the links only. Tokens must be equal. The page is
written from the results of all rates that lie in the folder of `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit.command import explains_errors, run_parser
from benchmarks.kit.places import DOCUMENTS, RESULTS
from benchmarks.ranks.figures import SKIPPED, claims
from benchmarks.ranks.groups import Group
from benchmarks.ranks.page import page, results
from specmoe_compile.bench.machine import provenance
from specmoe_compile.cli.bench import DEFAULT_PROMPT, describe_model
from specmoe_compile.cli.tokenizer import load_tokenizer
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.system.output import check_writable, write_json

SCHEMA = 1
SHARES = (0.125, 0.25)
WORKER = "benchmarks.ranks.worker"


@explains_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its page; 1 if a claim does not hold."""
    args = parse(argv)
    result = measure(args)
    found = claims(result)
    write_json(args.out, result)
    if not args.dry:
        args.page.write_text(page(results(args.out.parent)), encoding="utf-8")
    for claim in found:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}: {claim.measured}")
    return 0 if all(claim.holds for claim in found) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser("ranks", __doc__)
    parser.add_argument("--out", type=Path, help="by default ranks_cpu_Xms.json of the results")
    parser.add_argument("--page", type=Path, default=DOCUMENTS / "ranks.md")
    parser.add_argument("--store-dir", type=Path, help="where experts are packed; kept")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--miss-ms", type=float, default=12.0, help="time of a record on a link")
    parser.add_argument("--tokens", type=int, default=24, help="generated in a turn")
    parser.add_argument("--turns", type=int, default=4, help="of every case")
    parser.add_argument("--dry", action="store_true", help="one short turn, no page")
    args = parser.parse_args(argv)
    if args.dry:
        args.tokens, args.turns = SKIPPED + 4, 1
    if args.ranks < 2 or args.miss_ms <= 0 or args.turns < 1 or args.tokens < SKIPPED + 2:
        raise ValueError(
            "--ranks must be at least 2, --miss-ms above 0, --turns at least 1, --tokens at least"
            f" {SKIPPED + 2}."
        )
    args.out = args.out or RESULTS / f"ranks_cpu_{args.miss_ms:g}ms.json"
    check_writable(args.out, "out")
    check_writable(args.page, "page")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All turns; the document of schema 1."""
    model = describe_model(str(CHECKPOINT_DIR), "float32")
    experts, top_k = model["experts"][0], model["top_k"]
    record = -(-model["bytes_per_expert"] // 4096) * 4096
    slots = list(dict.fromkeys(max(top_k, round(share * experts)) for share in SHARES))
    with tempfile.TemporaryDirectory(prefix="specmoe-ranks-") as folder:
        job = {
            "model": str(CHECKPOINT_DIR),
            "store_dir": str((args.store_dir or Path(folder) / "store").absolute()),
            "bytes_per_s": record / (args.miss_ms / 1e3),
            "slot_bytes": record * model["moe_layers"],
            "slots": slots,
            "prompt": load_tokenizer(str(CHECKPOINT_DIR))(DEFAULT_PROMPT).input_ids,
            "new_tokens": args.tokens,
            "skipped": SKIPPED,
            "reduce_elements": hidden_size(),
        }
        with contextlib.ExitStack() as open_groups:
            groups: dict[int, Group] = {}
            for ranks in (1, args.ranks):
                groups[ranks] = Group(WORKER, job, ranks, Path(folder))
                open_groups.callback(groups[ranks].close)
                first = groups[ranks].first()
                print(f"{ranks} ranks are ready", flush=True)
            rows = take_turns(groups, slots, args.turns)
    return {
        "schema": SCHEMA,
        **provenance(),
        "label": "links simulated by a rate limit in front of each rank's reads, one link per rank",
        "model": model,
        "miss_ms": args.miss_ms,
        "ranks": args.ranks,
        "slots": slots,
        "tokens_timed": args.tokens - 1 - SKIPPED,
        "threads_per_rank": first["threads"],
        "all_reduce_us": first["all_reduce_us"],
        "rows": rows,
    }


def take_turns(groups: Mapping[int, Group], slots: Sequence[int], turns: int) -> list[Any]:
    """Every case once per turn, one after the other, back and forth."""
    cases = [(count, ranks) for count in slots for ranks in groups]
    rows = []
    for turn in range(turns):
        for count, ranks in cases if turn % 2 == 0 else reversed(cases):
            row = groups[ranks].turn({"slots": count})
            rows.append({"turn": turn, **row})
            told = f"turn {turn + 1}: {ranks} ranks, {count} slots: {row['mean_ms']:.1f} ms/token"
            print(told, flush=True)
    return rows


def hidden_size() -> int:
    """H of the reference model: what one sum over the ranks adds up per token."""
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text(encoding="utf-8"))
    size: int = config["hidden_size"]
    return size
