"""The pieces of `peers_gpu --run`: each system's own benchmark, one after the other, in a folder.

Each piece is a process, goes on with the rows that its file has, and gets what is left of the
time; what did not fit is left for another call. A rival whose program is not given is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARE_ARMS = ("resident", "cache_10", "cache_25", "cache_50", "specmoe_10", "specmoe_25")
MEMORY_ARMS = tuple(f"{kind}_{size}gb" for kind in ("cache", "specmoe") for size in (8, 16, 24))
SHORTEST_S = 30.0
"""Nothing is begun with less left."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A model and format in each system's own names; None: that system does not have it."""

    specmoe: str
    freetoken: str | None = None
    llama: tuple[str, str] | None = None
    accelerate: str | None = None


CELLS: Mapping[str, Cell] = {
    "qwen_bf16": Cell(
        "Qwen3-30B-A3B", "qwen_bf16", ("Qwen3-30B-A3B", "bf16"), accelerate="Qwen3-30B-A3B"
    ),
    "qwen_4bit": Cell("Qwen3-30B-A3B-nvfp4", "qwen_nvfp4", ("Qwen3-30B-A3B", "q4_0")),
    "qwen_fp8": Cell("Qwen3-30B-A3B-fp8", "qwen_fp8", ("Qwen3-30B-A3B", "q8_0")),
    "qwen_int4": Cell("Qwen3-30B-A3B-int4"),
    "gptoss_4bit": Cell("GPT-OSS-20B-mxfp4", "gptoss_mxfp4", ("GPT-OSS-20B", "mxfp4")),
    "deepseek_fp8": Cell("DeepSeek-V2-Lite-fp8", None, ("DeepSeek-V2-Lite", "q8_0")),
    "gptoss_bf16": Cell("GPT-OSS-20B", accelerate="GPT-OSS-20B"),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One process: its name, its command without the budget, and how it is told the budget."""

    name: str
    command: tuple[str, ...]
    budget: bool = True


def pieces(args: Any) -> Iterator[Piece]:
    """What the named cells take, specmoe first in each."""
    contexts = tuple(str(context) for context in args.contexts)
    for name in args.cells:
        cell, folder = CELLS[name], args.folder
        common = ["--contexts", *contexts]
        token = ["--model", cell.specmoe, *common, "--trace", str(args.trace)]
        token += ["--out", str(folder / f"token_{name}.json")]
        for routing in ("trace", "uniform"):
            arms = (*SHARE_ARMS, *MEMORY_ARMS) if routing == "trace" else SHARE_ARMS[1:4]
            chosen = ["--routing", routing, "--arms", *arms]
            yield _benchmark(f"{name}, specmoe, {routing}", "gpu_token", *token, *chosen)
        if cell.freetoken is not None and args.freetoken_driver is not None:
            yield from _freetoken(args, name, cell.freetoken)
        if cell.llama is not None and args.llama_bench is not None:
            model, form = cell.llama
            given = ["--bench", str(args.llama_bench), "--folder", str(args.gguf_folder), *common]
            given += ["--model", model, "--format", form, "--out", str(folder / "llama.jsonl")]
            yield _benchmark(f"{name}, llama.cpp", "peers_llama", *given)
        if cell.accelerate is not None:
            given = ["--model", cell.accelerate, "--out", str(folder / "accelerate.jsonl")]
            yield _benchmark(f"{name}, accelerate", "peers_accelerate", *given)


def _benchmark(name: str, run: str, *arguments: str) -> Piece:
    return Piece(name, (sys.executable, "-m", "benchmarks", run, *arguments))


def _freetoken(args: Any, name: str, model: str) -> Iterator[Piece]:
    """Its driver has no rows to go on with: a model and strategy that has some is left out."""
    out = args.folder / "freetoken.jsonl"
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    had = {(row["model"], row["strategy"]) for row in map(json.loads, lines)}
    for strategy, rates in (("offload", ("0.25", "0.5")), ("fused", ("1",))):
        if (model, strategy) not in had:
            given = ["--model", str(args.freetoken_configs / model), "--strategy", strategy]
            given += ["--rates", *rates, "--tables", str(args.freetoken_tables)]
            given += ["--routings", "trace", "--out", str(out)]
            command = (sys.executable, str(args.freetoken_driver), *given)
            yield Piece(f"{name}, FreeToken {strategy}", command, budget=False)


def run(todo: Sequence[Piece], budget_s: float) -> list[str]:
    """Run pieces one after the other; the names of those that failed or were not begun."""
    end, missing = time.monotonic() + budget_s, []
    for piece in todo:
        left = end - time.monotonic()
        if left < SHORTEST_S:
            print(f"left for another call: {piece.name}", flush=True)
            missing.append(piece.name)
            continue
        budget = ("--budget-s", f"{left:.0f}") if piece.budget else ()
        print(f"{piece.name}: at most {left:.0f} s", flush=True)
        try:
            status = subprocess.run([*piece.command, *budget], timeout=left).returncode
        except subprocess.TimeoutExpired:
            status = -1
        if status:
            print(
                f"{piece.name}: {'out of time' if status < 0 else f'status {status}'}", flush=True
            )
            missing.append(piece.name)
    return missing


def files_of(folder: Path) -> Mapping[str, list[Path]]:
    """What the pieces wrote, by the option of `peers_gpu` that reads it."""
    names = {"specmoe": "token_*.json", "freetoken": "freetoken.jsonl"}
    found = {option: sorted(folder.glob(pattern)) for option, pattern in names.items()}
    rivals = (folder / name for name in ("llama.jsonl", "accelerate.jsonl"))
    return {**found, "rivals": [path for path in rivals if path.exists()]}
