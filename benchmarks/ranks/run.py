"""Two CPU ranks beside one, each behind a simulated link of the same rate: time per token.

    python -m benchmarks ranks [--out FILE] [--page FILE] [--dry]

The reference model in float32, experts on disk; each rank's reads pass a link that takes as long
for a record as is asked for (`--miss-ms`). One rank and N ranks run in turns, each rank on one
thread. N ranks with the same slots per rank have N times the links and N times the cache; with the
same slots in all they have N times the links only. Tokens must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit.claims import Claim
from benchmarks.kit.command import explains_errors, run_parser
from benchmarks.kit.places import DOCUMENTS, RESULTS, ROOT
from specmoe_compile.bench.machine import provenance
from specmoe_compile.cli.bench import DEFAULT_PROMPT, describe_model
from specmoe_compile.cli.generate import load_tokenizer
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.system.output import write_json

SCHEMA = 1
SHARES = (0.25, 0.5)
MOST = 0.6
"""Two ranks may take this part of one's time, at the same slots per rank."""
SKIPPED = 4
WORKER = "benchmarks.ranks.worker"


@explains_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its page; 1 if a claim does not hold."""
    args = parse(argv)
    result = measure(args)
    write_json(args.out, result)
    args.page.write_text(page(result), encoding="utf-8")
    for claim in claims(result):
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}: {claim.measured}")
    return 0 if all(claim.holds for claim in claims(result)) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = run_parser("ranks", __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks_cpu.json")
    parser.add_argument("--page", type=Path, default=DOCUMENTS / "ranks.md")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--miss-ms", type=float, default=3.0, help="time of a record on a link")
    parser.add_argument("--tokens", type=int, default=48, help="timed, per case and turn")
    parser.add_argument("--turns", type=int, default=2, help="A B A B ...")
    parser.add_argument("--dry", action="store_true", help="one short turn")
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.miss_ms <= 0 or args.turns < 1:
        raise ValueError("--ranks must be at least 2, --miss-ms above 0, --turns at least 1.")
    if args.dry:
        args.tokens, args.turns = SKIPPED + 4, 1
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All turns; the document of schema 1."""
    model = describe_model(str(CHECKPOINT_DIR), "float32")
    experts, top_k = model["experts"][0], model["top_k"]
    record = -(-model["bytes_per_expert"] // 4096) * 4096
    slots = [max(top_k, round(share * experts)) for share in SHARES]
    halves = [max(min(top_k, experts // args.ranks), each // args.ranks) for each in slots]
    with tempfile.TemporaryDirectory(prefix="specmoe-ranks-") as folder:
        job = {
            "model": str(CHECKPOINT_DIR),
            "store_dir": str(Path(folder) / "store"),
            "bytes_per_s": record / (args.miss_ms / 1e3),
            "slot_bytes": record * model["moe_layers"],
            "prompt": load_tokenizer(str(CHECKPOINT_DIR))(DEFAULT_PROMPT).input_ids,
            "new_tokens": args.tokens,
            "skipped": SKIPPED,
            "reduce_elements": hidden_size(),
            "out": str(Path(folder) / "out.json"),
        }
        rows: list[dict[str, Any]] = []
        reduce_us: list[float] = []
        for turn in range(args.turns):
            for ranks in (1, args.ranks):
                cases = slots if ranks == 1 else list(dict.fromkeys([*slots, *halves]))
                found = run_group({**job, "slots": cases}, ranks, Path(folder))
                rows += [{"turn": turn, **row} for row in found["rows"]]
                reduce_us += [found["all_reduce_us"]] * (ranks > 1)
                for row in found["rows"]:
                    shown = f"{ranks} ranks, {row['slots']} slots: {row['mean_ms']:.1f} ms/token"
                    print(shown, flush=True)
    return {
        "schema": SCHEMA,
        **provenance(),
        "label": "links simulated by a rate limit in front of each rank's reads",
        "model": model,
        "miss_ms": args.miss_ms,
        "ranks": args.ranks,
        "slots": slots,
        "slots_in_all": halves,
        "tokens_timed": args.tokens - 1 - SKIPPED,
        "threads_per_rank": 1,
        "all_reduce_us": reduce_us,
        "rows": rows,
    }


def hidden_size() -> int:
    """H of the reference model: what one sum over the ranks adds up per token."""
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text(encoding="utf-8"))
    size: int = config["hidden_size"]
    return size


def run_group(
    job: Mapping[str, Any], ranks: int, folder: Path, module: str = WORKER
) -> dict[str, Any]:
    """Run a job of a worker module on so many ranks, and return what rank 0 wrote.

    Raises:
        RuntimeError: a rank failed; its last lines are in the message.
    """
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    worker = ["-m", module, str(path)]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        worker = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--master-port",
            port,
            *worker,
        ]
    # Multicast over NVLink is not to be had on every machine that has NVLink.
    chosen = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NCCL_NVLS_ENABLE": "0"}
    environment = {**os.environ, **chosen}
    ended = subprocess.run(
        [sys.executable, *worker], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if ended.returncode:
        raise RuntimeError(f"{ranks} ranks failed:\n{ended.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
    return found


def mean_ms(result: Mapping[str, Any], ranks: int, slots: int) -> float:
    """Time per token of a case, over its turns."""
    found = [r["mean_ms"] for r in result["rows"] if (r["ranks"], r["slots"]) == (ranks, slots)]
    return float(sum(found) / len(found))


def claims(result: Mapping[str, Any]) -> list[Claim]:
    """What must hold."""
    ranks = result["ranks"]
    found = []
    for slots in result["slots"]:
        share = mean_ms(result, ranks, slots) / mean_ms(result, 1, slots)
        found.append(
            Claim(
                text=f"{ranks} ranks with {slots} slots each take at most {MOST} x one rank's time",
                measured=f"{share:.3f}",
                holds=share <= MOST,
            )
        )
    different = len({tuple(row["tokens"]) for row in result["rows"]})
    found.append(
        Claim(
            text="tokens are equal in all cases",
            measured=f"{different} different",
            holds=different == 1,
        )
    )
    return found


def page(result: Mapping[str, Any]) -> str:
    """The document."""
    ranks, machine = result["ranks"], result["machine"]
    model = result["model"]
    body = []
    for row in sorted(result["rows"], key=lambda r: (r["ranks"], r["slots"], r["turn"])):
        steps = len(row["tokens"])
        body.append(
            (
                str(row["ranks"]),
                f"{row['slots']} of {row['experts_per_rank']}",
                str(row["turn"] + 1),
                f"{row['mean_ms']:.1f}",
                f"{row['tpot_ms']['p20']:.1f}..{row['tpot_ms']['p80']:.1f}",
                f"{100 * row['hit_rate']:.1f} %",
                f"{row['misses'] / steps:.1f}",
                f"{row['misses_of_rank_0'] / steps:.1f}",
            )
        )
    head = ("ranks", "slots per rank", "turn", "ms/token", "p20..p80", "hits", "misses/token")
    said = [f"- {c.text}: {c.measured}. {'Holds' if c.holds else 'Fails'}." for c in claims(result)]
    one, split = result["slots"][0], result["slots_in_all"][0]
    alone = mean_ms(result, ranks, split) / mean_ms(result, 1, one)
    reduce_us = sum(result["all_reduce_us"]) / len(result["all_reduce_us"])
    lines = [
        "# Several ranks, simulated links",
        "",
        "Written by `python -m benchmarks ranks` from `benchmarks/results/ranks_cpu.json`. Commit:",
        f"{(result['commit'] or 'unknown')[:12]}; {machine['cpu']}, {machine['cores']} cores.",
        "",
        f"The reference model ({model['moe_layers']} layers of {model['experts'][0]} experts,"
        f" K = {model['top_k']}) in float32, experts on disk. **The links are simulated**: a",
        f"record takes {result['miss_ms']:g} ms on its rank's link, one after the other. One rank"
        f" and {ranks} ranks in turns, each rank",
        "on one thread, on the same machine; times are wall time per token of `generate`, without"
        f" the first {SKIPPED + 1} tokens.",
        "",
        *said,
        f"- With {split} slots on each of {ranks} ranks, the same cache in all as {one} on one"
        f" rank, the time is {alone:.3f} x: what the links alone give. A layer",
        "  waits for the rank with the most misses, so it is more than 1 / N.",
        f"- A sum over the ranks takes {reduce_us:.0f} us here (gloo).",
        "",
        *markdown_table((*head, "of them rank 0's"), body).splitlines(),
        "",
    ]
    return "\n".join(lines)
