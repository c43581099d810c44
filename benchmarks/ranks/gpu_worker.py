"""One rank of `python -m benchmarks ranks_gpu`: started by torchrun, or alone, with a job's path.

The job is JSON: `phase` (check, link, sums, cells), `dry`, `checkpoint`, `store_dir`, `shape`,
`layers`, `arms`, `sums`, `trace`, `out`. Rank 0 writes what was found to `out`; in phase `cells`
it takes turns, of `context` and `stage`, and then of each `arm` and way of `sums`, as a `Group`
asks for them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import specmoe_compile
import specmoe_compile.backend
from benchmarks.full_size.arms import ARMS, free_memory, learn_vectors
from benchmarks.full_size.generation import Generation, measure_cell
from benchmarks.full_size.model import SHAPES
from benchmarks.full_size.routing import trace_predictions
from benchmarks.full_size.run import VECTOR_TOKENS
from benchmarks.full_size.token import DRY_STEPS, STEPS
from benchmarks.full_size.trace import RoutingTrace, map_trace
from benchmarks.ranks.groups import Turns
from benchmarks.ranks.split_model import SplitBench, filled_cache, open_store
from benchmarks.ranks.sums import time_sums
from benchmarks.ranks.worker import all_reduce_us
from specmoe_compile.hf.ranks import device_of_rank, join_ranks
from specmoe_compile.system.launched import launched, split_of_ranks

LINK_BYTES, LINK_COPIES = 1 << 30, 8
STUCK_S = 280.0
"""A rank that has not done what it was asked for by then says where it is, and ends."""


def main(job_path: str) -> None:
    """Run the job's phase."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    device = torch.device("cpu") if job["dry"] else device_of_rank(torch.device("cuda"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = launched().size
    if size > 1:
        join_ranks({"tp_size": size, "ep_size": size}, device)
    if job["phase"] == "cells":
        cells(job, device)
        return
    with told_if_stuck():
        found = PHASES[job["phase"]](job, device)
    if launched().rank == 0:
        Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


@contextlib.contextmanager
def told_if_stuck() -> Iterator[None]:
    """End this process, and say where it is, if the block takes longer than `STUCK_S`."""
    faulthandler.dump_traceback_later(STUCK_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def check_tokens(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tokens of a small model in float32, from a store on disk that all ranks share."""
    model: Any = specmoe_compile.from_pretrained(
        job["checkpoint"],
        device=device.type,
        dtype="float32",
        store="disk" if job["dry"] else "ram",
        store_dir=job["store_dir"] if job["dry"] else None,
        expert_cache="50%",
        progress=False,
        **split_of_ranks(),
    )
    options: dict[str, Any] = {"prefetch": True, "sums": job["sums"][-1]}
    if not job["dry"]:
        options["mode"] = "reduce-overhead"
    compiled: Any = torch.compile(model, backend="specmoe", options=options)
    prompt = torch.arange(3, 19, device=device)[None]
    with torch.no_grad():
        out = compiled.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8 if job["dry"] else 48,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
    return {"tokens": out[0].tolist(), "stats": specmoe_compile.stats(model).total.as_dict()}


def link_rates(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What each rank's link brings while all copy at once, 1e9 bytes per second; and a sum's time.

    Without a GPU there is no link to measure.
    """
    size = launched().size
    found: dict[str, Any] = {"gbps": None, "all_reduce_us": None}
    if size > 1:
        elements = SHAPES[job["shape"]].configured(job["layers"]).hidden_size
        reduce = reduce_on_gpu_us if device.type == "cuda" else all_reduce_us
        found["all_reduce_us"] = reduce(elements)
    if device.type != "cuda":
        return found
    host = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    there.copy_(host)
    if size > 1:
        dist.barrier()
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(LINK_COPIES):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    gbps = LINK_BYTES * LINK_COPIES / 1e9 / (time.perf_counter() - began_s)
    rates: list[Any] = [gbps]
    if size > 1:
        rates = [None] * size
        dist.all_gather_object(rates, gbps)
    return {**found, "gbps": rates}


def reduce_on_gpu_us(elements: int) -> float:
    """Median device time of a sum over the ranks, of so many bfloat16, by events."""
    values = torch.ones(elements, dtype=torch.bfloat16, device="cuda")
    spans = []
    for _ in range(100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        dist.all_reduce(values)
        end.record()
        end.synchronize()
        spans.append(1e3 * begin.elapsed_time(end))
        values.fill_(1.0)
    return float(median(spans))


@torch.no_grad()
def cells(job: dict[str, Any], device: torch.device) -> None:
    """One shape: prepare a stage of a context, then a row per arm, as they are asked for.

    The arms of a stage have one session and graph: the slots of the largest, of which each uses
    its own. Arms that have slots for all of a rank's experts are one arm here.
    """
    turns = Turns(job, launched().rank)
    with told_if_stuck():
        bench = open_bench(job, device)
    everyone = bench.store.num_experts[0]
    slots = {name: bench.slots(ARMS[name]) for name in job["arms"]}
    resident = [name for name, count in slots.items() if count == everyone]
    turns.answer({"resident": resident})
    ask = turns.next_or_none()
    while ask is not None:
        is_resident = ask["stage"] == "resident"
        names = [name for name in slots if (name in resident) == is_resident]
        if names:
            ask = stage(bench, job, names, ask, turns)
            # The stage's session and caches are gone with its frame, and the next needs the room.
            free_memory(device)
        else:
            turns.answer({})
            ask = turns.next_or_none()


def stage(
    bench: SplitBench,
    job: dict[str, Any],
    names: Sequence[str],
    asked: dict[str, Any],
    turns: Turns,
) -> dict[str, Any] | None:
    """Prepare these arms and measure what is asked for; the first thing asked for that is no arm.

    Arms with as many slots as there are experts are measured once in each turn.
    """
    is_resident = asked["stage"] == "resident"
    with contextlib.ExitStack() as opened:
        with told_if_stuck():
            runs = prepared(bench, job, names, asked["context"], opened)
        turns.answer({})
        rows: dict[tuple[int, int, str], dict[str, Any]] = {}
        while (ask := turns.next_or_none()) is not None and "arm" in ask:
            key = ask["turn"], bench.slots(ARMS[ask["arm"]]), ask["sums"]
            if not is_resident or key not in rows:
                with told_if_stuck():
                    rows[key] = cell(bench, runs[ask["sums"]], ask["arm"])
            turns.answer(rows[key])
    return ask


def prepared(
    bench: SplitBench,
    job: dict[str, Any],
    names: Sequence[str],
    context: int,
    opened: contextlib.ExitStack,
) -> dict[str, Generation]:
    """A session for these arms, compiled and captured for each way of sums; `opened` closes it."""
    slots = max(bench.slots(ARMS[name]) for name in names)
    model, session, routing = opened.enter_context(bench.opened(slots))
    opened.enter_context(trace_predictions())
    filled = filled_cache(bench, model, context)
    runs = {}
    for sums in job["sums"]:
        options = {**graph_options(job), "sums": sums}
        compiled = torch.compile(model, backend="specmoe", options=options, fullgraph=True)
        runs[sums] = Generation(bench, compiled, session, routing, filled)
        runs[sums].start(names[0])
        runs[sums].run(4)
    return runs


def open_bench(job: dict[str, Any], device: torch.device) -> SplitBench:
    """The records of this rank's experts, and the routing that all ranks share."""
    size, shape = launched().size, SHAPES[job["shape"]]
    config = shape.configured(job["layers"])
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    store = open_store(shape, device, size, job["layers"])
    trace = RoutingTrace.load(Path(job["trace"]))
    tables = map_trace(
        trace,
        layers=len(store.num_experts),
        experts=experts,
        top_k=config.num_experts_per_tok,
    )
    bench = SplitBench(
        shape=shape,
        device=device,
        store=store,
        tables=tables.to(device),
        steps=DRY_STEPS if job["dry"] else STEPS,
        lowering="eager" if job["dry"] else "inductor",
        layers=job["layers"],
        ranks=size,
        experts=experts,
    )
    learn_vectors(bench, 32 if job["dry"] else VECTOR_TOKENS)
    return bench


def graph_options(job: dict[str, Any]) -> dict[str, Any]:
    """Of the backend: the same for all arms, which are caches alone."""
    options: dict[str, Any] = {**ARMS[job["arms"][0]].options, "strict": True, "transfer": "gather"}
    return {**options, **({"lowering": "eager"} if job["dry"] else {"mode": "reduce-overhead"})}


def cell(bench: SplitBench, run: Generation, name: str) -> dict[str, Any]:
    """One arm."""
    row = measure_cell(bench, run, name)
    sums_ms = sum(k["ms_per_token"] for k in row["kernels"] if is_sum(k["kernel"]))
    return {**row, "slots": bench.slots(ARMS[name]), "sums_ms_per_token": sums_ms}


def is_sum(kernel: str) -> bool:
    """Whether a kernel adds up over the ranks."""
    return "nccl" in kernel.lower() or "sum_ranks" in kernel


def sums_over_ranks(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Times of sums over the ranks, of the hidden state of the job's shape."""
    if launched().size == 1:
        return {}
    shape = SHAPES[job["shape"]]
    return time_sums(shape.configured(job["layers"]).hidden_size, shape.dtype, device)


PHASES = {"check": check_tokens, "link": link_rates, "sums": sums_over_ranks}


if __name__ == "__main__":
    main(sys.argv[1])
