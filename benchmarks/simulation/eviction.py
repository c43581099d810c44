"""Cache policies on recorded routing: hits of each, beside Belady's. Simulated.

    python -m benchmarks eviction --out eviction.json [--tokens 20000]

Texts: what this machine's Python and the repository hold, and generated ones (tables, logs, words
in another alphabet, chat turns); the reference model reads them in windows, its routers' choices
are the streams. `joined` changes its text every so many tokens. Also: hits in the 200 tokens that
begin 200 after each change.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kit.places import ROOT
from specmoe_compile.bench.machine import provenance
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache, belady_hits

POLICIES: tuple[Policy, ...] = ("lru", "lfu", "adaptive")
WINDOW = 1000
TURN = 1500  # tokens of a topic in `joined`
SETTLED, LOOKED_AT = 200, 200
WORDS = "все счастливые семьи похожи друг на друга каждая несчастливая семья по своему"
CHAT = "open close the a file read write list sort find why when because then error value"


def texts(characters: int) -> dict[str, str]:
    """Seven kinds of text, at least so many characters each."""
    rng = random.Random(0)
    code = sorted(Path(argparse.__file__).parent.glob("*.py"))
    prose = [ROOT / "LICENSE", *sorted((ROOT / "docs").rglob("*.md"))]
    return {
        "python": _read(code, characters),
        "headers": _read(sorted(Path(torch.__file__).parent.rglob("include/**/*.h")), characters),
        "prose": _read(prose, characters),
        "table": "".join(
            f"{i},{rng.gauss(0, 1):.4f},{rng.choice('NSEW')},{rng.randint(100, 999)}\n"
            for i in range(characters // 16)
        ),
        "log": "".join(
            f"2026-11-{i % 28 + 1:02d}T{i % 24:02d}:{i % 60:02d}:07Z {rng.choice(('INFO', 'WARN'))}"
            f" worker-{rng.randint(1, 9)} request id={rng.randint(1000, 99999)} took"
            f" {rng.randint(1, 900)} ms\n"
            for i in range(characters // 60)
        ),
        "cyrillic": " ".join(rng.choice(WORDS.split()) for _ in range(characters // 6)),
        "chat": "".join(
            rng.choice(("User: How do I ", "Assistant: You can "))
            + " ".join(rng.choice(CHAT.split()) for _ in range(rng.randint(5, 25)))
            + rng.choice((".\n", "?\n"))
            for _ in range(characters // 40)
        ),
    }


def _read(files: list[Path], characters: int) -> str:
    text = ""
    for file in files:
        text += file.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= characters:
            break
    return text[:characters]


def record(tokens: int) -> dict[str, list[list[list[int]]]]:
    """Experts of each layer and token, by text: {name: [L][tokens][K]}."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    top_k = model.config.num_experts_per_tok
    out: dict[str, list[list[list[int]]]] = {}
    for name, text in texts(5 * tokens).items():
        ids = tokenizer(text, return_tensors="pt").input_ids[0, :tokens]
        parts: list[Any] = []
        for start in range(0, len(ids), WINDOW):
            with torch.no_grad():
                found = model(ids[None, start : start + WINDOW], output_router_logits=True)
            parts.append(torch.stack([x.topk(top_k, -1).indices for x in found.router_logits]))
        out[name] = torch.cat(parts, 1).tolist()
    kinds = list(out)
    turns = max(1, tokens // TURN // 4)
    out["joined"] = [
        [step for turn in range(turns) for kind in kinds for step in _turn(out[kind][layer], turn)]
        for layer in range(len(out["python"]))
    ]
    return out


def _turn(stream: list[list[int]], turn: int) -> list[list[int]]:
    return stream[turn * TURN : (turn + 1) * TURN]


def hits(stream: list[list[int]], slots: int, experts: int, policy: Policy) -> list[int]:
    """Hits of each step of one layer."""
    table = ExpertCache(num_experts=[experts], slots=[slots], policy=policy)
    return [len(table.plan(0, wanted).hits) for wanted in stream]


def row(layers: list[list[list[int]]], slots: int, experts: int, name: str) -> dict[str, Any]:
    """Hit rates of one text and size, means of the layers, in percent."""
    choices = sum(len(wanted) for wanted in layers[0])
    best = sum(belady_hits(stream, slots) for stream in layers)
    found: dict[str, Any] = {"text": name, "slots": slots}
    for policy in POLICIES:
        by_layer = [hits(stream, slots, experts, policy) for stream in layers]
        found[policy] = 100 * sum(map(sum, by_layer)) / (choices * len(layers))
        if name == "joined":
            after = [
                counts[start + SETTLED : start + SETTLED + LOOKED_AT]
                for counts in by_layer
                for start in range(TURN, len(counts) - SETTLED - LOOKED_AT, TURN)
            ]
            top_k = len(layers[0][0])
            found[f"{policy}_after_change"] = (
                100 * sum(map(sum, after)) / (top_k * sum(map(len, after)))
            )
    found["belady"] = 100 * best / (choices * len(layers))
    return found


def _way(rates: dict[str, Any]) -> float:
    """How much of the way from LRU to Belady `adaptive` goes."""
    return float((rates["adaptive"] - rates["lru"]) / (rates["belady"] - rates["lru"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Record, replay every policy, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks eviction", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--slots", type=int, nargs="+", default=[6, 8, 12, 16, 24])
    arguments = parser.parse_args(argv)
    streams = record(arguments.tokens)
    experts = 1 + max(max(max(step) for step in stream) for stream in streams["python"])
    rows = []
    for slots in arguments.slots:
        for name, layers in streams.items():
            rows.append(row(layers, slots, experts, name))
            print(
                json.dumps(
                    {k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}
                ),
                flush=True,
            )
    total = {name: sum(r[name] for r in rows) for name in (*POLICIES, "belady")}
    result = {
        "schema": 1,
        **provenance(),
        "label": "simulated from recorded routing",
        "tokens": arguments.tokens,
        "rows": rows,
        "way_from_lru_to_belady": _way(total),
        "mean_of_ways": sum((r["adaptive"] - r["lru"]) / (r["belady"] - r["lru"]) for r in rows)
        / len(rows),
        "worst_against_lru": min(r["adaptive"] - r["lru"] for r in rows),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0
