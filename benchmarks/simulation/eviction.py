"""Cache policies on recorded routing: hits of each, beside Belady's. Simulated.

The routing is that of `benchmarks.simulation.eviction_texts`; every policy runs in the runtime's
own cache, in C++ where there is a compiler: the same integers. Also: hits in the 200 tokens that
begin 200 after each change of text, steps of four tokens, and the first tokens after a prompt
(`benchmarks.simulation.eviction_prompts`). Rules that were tried and not taken are in
`benchmarks.simulation.eviction_trials`.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
from collections.abc import Mapping, Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.kit.command import run_parser
from benchmarks.kit.places import DOCUMENTS, RESULTS
from benchmarks.simulation.eviction_budgets import try_budgets
from benchmarks.simulation.eviction_prompts import try_prompts
from benchmarks.simulation.eviction_report import write_report
from benchmarks.simulation.eviction_texts import TURN, checksum, record
from benchmarks.simulation.eviction_trials import try_probabilities, try_rules
from benchmarks.simulation.fast_replay import best_hits, hits, library_or_none
from specmoe_compile.bench.machine import provenance
from specmoe_compile.system.output import write_json

Stream = list[list[int]]
RESULT, REPORT = RESULTS / "eviction.json", DOCUMENTS / "eviction.md"
TIMES = tuple(RESULTS / f"eviction_time{of}.json" for of in ("", "_given", "_given_25"))
SPARE = 4
"""Places besides the slots, as many as a token has experts: what a session on a CPU has."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    "lru": {"policy": "lru"},
    "lfu": {"policy": "lfu"},
    "kept": {"policy": "adaptive"},
    "adaptive": {"policy": "adaptive", "spare": SPARE},
}
"""`kept` is policy `adaptive` without spare places: every missing expert gets a slot."""
SLOTS = (4, 6, 8, 12, 16, 24)
EXPERTS = 32
SETTLED, LOOKED_AT = 200, 200
BATCH, BATCH_SLOTS = 4, (16, 24)


def row(job: tuple[str, int, list[Stream]]) -> dict[str, Any]:
    """Hit rates of one text and size, means of the layers, in percent."""
    name, slots, layers = job
    choices = sum(len(wanted) for stream in layers for wanted in stream)
    found: dict[str, Any] = {"text": name, "slots": slots}
    for arm in ARMS:
        by_layer = [hits(stream, EXPERTS, slots, **ARMS[arm]) for stream in layers]
        found[arm] = 100 * sum(map(sum, by_layer)) / choices
        if name == "joined":
            found[f"{arm}_after_change"] = _after_change(by_layer, len(layers[0][0]))
    for key, may_bypass in (("belady", False), ("belady_bypass", True)):
        best = [best_hits(stream, EXPERTS, slots, may_bypass=may_bypass) for stream in layers]
        found[key] = 100 * sum(best) / choices
    return found


def _after_change(by_layer: Sequence[list[int]], top_k: int) -> float:
    """Percent of hits in the tokens that begin SETTLED after each change of text."""
    after = [
        counts[start + SETTLED : start + SETTLED + LOOKED_AT]
        for counts in by_layer
        for start in range(TURN, len(counts) - SETTLED - LOOKED_AT, TURN)
    ]
    return 100 * sum(map(sum, after)) / (top_k * sum(map(len, after)))


def together(stream: Stream) -> Stream:
    """Steps of BATCH tokens, from as many places of the text: the union of their experts."""
    part = len(stream) // BATCH
    places = [stream[start * part : (start + 1) * part] for start in range(BATCH)]
    return [
        list(dict.fromkeys(functools.reduce(operator.iadd, step, [])))
        for step in zip(*places, strict=True)
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far policies go from LRU to what is best possible; means of the rows' shares."""
    found: dict[str, Any] = {}
    for best in ("belady", "belady_bypass"):
        open_rows = [r for r in rows if r[best] > r["lru"]]
        found[f"way_to_{best}"] = {
            arm: sum((r[arm] - r["lru"]) / (r[best] - r["lru"]) for r in open_rows) / len(open_rows)
            for arm in ARMS
        }
        total = {name: sum(r[name] for r in open_rows) for name in (*ARMS, best)}
        found[f"summed_way_to_{best}"] = {
            arm: (total[arm] - total["lru"]) / (total[best] - total["lru"]) for arm in ARMS
        }
    joined = [r for r in rows if r["text"] == "joined"]
    for arm in ("kept", "adaptive"):
        found[f"worst_{arm}_against_lru"] = min(r[arm] - r["lru"] for r in rows)
        found[f"worst_{arm}_after_change"] = min(
            r[f"{arm}_after_change"] - r["lru_after_change"] for r in joined
        )
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Record the routing and replay every policy."""
    recorded, logits, digests = record(arguments.tokens)
    streams: dict[str, list[Stream]] = {name: ids.tolist() for name, ids in recorded.items()}
    jobs = [(name, slots, streams[name]) for slots in SLOTS for name in streams]
    batches = [
        (name, slots, [together(stream) for stream in layers])
        for slots in BATCH_SLOTS
        for name, layers in streams.items()
        if name != "joined"
    ]
    trial_tokens = min(arguments.trial_tokens, arguments.tokens)
    library_or_none()  # compiled once, before there are workers
    with Pool(arguments.workers) as pool:
        rows = pool.map(row, jobs, chunksize=1)
        of_batches = pool.map(row, batches, chunksize=1)
        seeding = try_prompts(recorded, pool)
        trials = try_rules({k: v[:, :trial_tokens] for k, v in recorded.items()}, pool)
        more = try_more(recorded, logits, trial_tokens, pool)
    return {
        "schema": 4,
        "label": "simulated from recorded routing",
        **provenance(),
        "tokens": {name: len(layers[0]) for name, layers in streams.items()},
        "texts_sha256": digests,
        "routing_crc32": checksum(recorded),
        "spare": SPARE,
        "rows": rows,
        "batch": {"tokens": BATCH, "rows": of_batches},
        "seeding": seeding,
        "trial_tokens": trial_tokens,
        "trials": trials,
        "summary": summary(rows),
        "more": more,
    }


def try_more(
    recorded: Mapping[str, Tensor], logits: Mapping[str, Tensor], trial_tokens: int, pool: Any
) -> dict[str, Any]:
    """Budgets by layer and counts of probabilities; may be of another commit than the rest."""
    tokens = min(trial_tokens, *(of.shape[1] for of in recorded.values()))
    arms = {name: ARMS[name] for name in ("lru", "adaptive")}
    streams = {name: ids.tolist() for name, ids in recorded.items()}
    return {
        "commit": provenance()["commit"],
        "routing_crc32": checksum(dict(recorded)),
        "trial_tokens": tokens,
        "budgets": try_budgets(streams, EXPERTS, arms, pool),
        "probabilities": try_probabilities(
            {name: of[:, :tokens] for name, of in recorded.items()},
            {name: of[:, :tokens] for name, of in logits.items()},
            pool,
        ),
    }


def measure_prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    """`try_prompts` alone, with the rest of the result as it is."""
    recorded, _, _ = record(arguments.tokens)
    library_or_none()
    with Pool(arguments.workers) as pool:
        seeding = try_prompts(recorded, pool)
    return {**_read(arguments.result), "schema": 4, "seeding": seeding}


def measure_more(arguments: argparse.Namespace) -> dict[str, Any]:
    """`try_more` alone, with the rest of the result as it is."""
    recorded, logits, _ = record(arguments.tokens)
    library_or_none()
    with Pool(arguments.workers) as pool:
        more = try_more(recorded, logits, arguments.trial_tokens, pool)
    return {**_read(arguments.result), "more": more}


MEASURES = {"all": measure, "more": measure_more, "prompts": measure_prompts}


def main(argv: Sequence[str] | None = None) -> int:
    """Record, replay every policy, write; returns 0, or 1 where `adaptive` misses its marks."""
    parser = run_parser("eviction", __doc__)
    parser.add_argument("--tokens", type=int, default=20000, help="of each text")
    parser.add_argument("--trial-tokens", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument(
        "--times", type=Path, nargs="*", default=TIMES, help="of eviction_time, those that exist"
    )
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--only", choices=(*MEASURES, "report"), default="all")
    arguments = parser.parse_args(argv)
    if arguments.only in MEASURES:
        write_json(arguments.result, MEASURES[arguments.only](arguments))
    times = [_read(path) for path in arguments.times if path.is_file()]
    return 0 if write_report(_read(arguments.result), arguments.report, times) else 1


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
