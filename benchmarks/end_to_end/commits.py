"""Whole processes of two commits in turns, to see that this tree is as fast as an earlier one.

    python -m benchmarks commits --base 3948034
    python -m benchmarks commits --base 3948034 --rounds 2     # adds rounds to those there are

Each turn is `specmoe bench` of one commit, every arm in a process of its own, on the model of the
demo; `specmoe` predicts, whatever the commit does by default. Turns go back and forth, so that a
drift of the machine hits both commits alike. A ratio is the mean over rounds of this tree's median
time per token over the other's, with its standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.kit.command import run_parser
from benchmarks.kit.paired import ratio
from benchmarks.kit.places import RESULTS, ROOT
from specmoe_compile.bench.machine import provenance
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import write_json

ARMS = ("cache", "specmoe", "resident")
PREDICT = ["-O", "prefetch=true"]
"""Of arm `specmoe`, which else does as the commit's default says."""
LIMIT = 1.02
"""Longest time per token that is as fast, over that of the earlier commit."""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A work tree of a commit, removed at the end.

    Raises:
        ValueError: the repository has no such commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        command = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run(
            [*command, "add", "--detach", str(tree), commit], capture_output=True, text=True
        )
        if added.returncode:
            raise ValueError(f"--base {commit}: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            subprocess.run([*command, "remove", "--force", str(tree)], check=True)


def turn(tree: Path, model: Path, store: Path, given: argparse.Namespace) -> dict[str, float]:
    """Median time per token in ms of each arm, by the package in `tree`.

    Raises:
        ValueError: an arm failed, or the command did.
    """
    found: dict[str, float] = {}
    for options in ([], PREDICT):
        arms = [arm for arm in given.arms if (arm == "specmoe") == bool(options)]
        if arms:
            found |= _bench(tree, model, store, given, ["--arms", ",".join(arms), *options])
    return {arm: found[arm] for arm in given.arms}


def _bench(
    tree: Path, model: Path, store: Path, given: argparse.Namespace, more: list[str]
) -> dict[str, float]:
    out = store.parent / f"{store.name}.json"
    command = [sys.executable, "-m", "specmoe_compile.cli.main", "bench", str(model), *more]
    command += ["--repeats", "1", "--json", str(out)]
    command += ["--new-tokens", str(given.new_tokens), "--store-dir", str(store)]
    command += ["--dtype", "float32", "--expert-cache", "25%"]
    # The folder that a module is run from comes before what is installed.
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"specmoe bench in {tree.name}: {done.stderr.strip().splitlines()[-1]}")
    return {arm["name"]: arm["tpot_ms"]["p50"] for arm in json.loads(out.read_text())["arms"]}


def ratios(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each arm, this tree's time over the base's: mean and standard error over two rounds up."""
    found = {}
    for arm in rounds[0]["base"]:
        ours, base = ([turns[side][arm] for turns in rounds] for side in ("ours", "base"))
        compared = ratio(ours, base)
        found[arm] = {"ratio": compared.mean, "error": compared.error}
    return found


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = run_parser("commits", __doc__)
    parser.add_argument("--base", required=True, help="the earlier commit")
    parser.add_argument("--model", type=Path, help="checkpoint folder; by default the demo's")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--stores", type=Path, default=cache_folder() / "commits")
    parser.add_argument("--out", type=Path, default=RESULTS / "commits.json")
    return parser.parse_args(argv)


def demo_model() -> Path:
    """The checkpoint that `specmoe demo` has made.

    Raises:
        ValueError: there is none.
    """
    found = sorted((cache_folder() / "demo").glob("*/config.json"))
    if found:
        return found[0].parent
    raise ValueError("There is no model of the demo: run `specmoe demo` once, or give --model.")


def main(argv: Sequence[str] | None = None) -> int:
    """Add rounds to the result; returns 1 if an arm is slower than the limit by two errors."""
    given = parse_arguments(argv)
    model = given.model or demo_model()
    result: dict[str, Any] = {"schema": 1, **provenance(), "base": given.base, "rounds": []}
    if given.out.exists():
        before = json.loads(given.out.read_text())
        for name in ("base", "commit"):
            if before[name] != result[name]:
                raise ValueError(
                    f"{given.out} compares {name} {before[name]}, and this run {result[name]}:"
                    " give another --out."
                )
        result = before
    given.stores.mkdir(parents=True, exist_ok=True)
    with checkout(given.base) as tree:
        places = {"base": tree, "ours": ROOT}
        for _ in range(given.rounds):
            number = len(result["rounds"])
            order = list(places) if number % 2 == 0 else list(reversed(places))
            turns = {}
            for side in order:
                turns[side] = turn(places[side], model, given.stores / side, given)
                print(f"{number + 1} {side}: {turns[side]}", flush=True)
            result["rounds"].append(turns)
            if len(result["rounds"]) > 1:
                result["ratios"] = ratios(result["rounds"])
            write_json(given.out, result)
    found = result.get("ratios", {})
    rows = [(arm, f"{r['ratio']:.3f} +- {r['error']:.3f}") for arm, r in found.items()]
    print(markdown_table(("arm", "time per token, this tree over the other"), rows))
    return int(any(r["ratio"] - 2 * r["error"] > LIMIT for r in found.values()))
