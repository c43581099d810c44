"""One rank of `python -m benchmarks ranks`: started by torchrun, or alone, with a job's path.

The job is JSON: `model`, `store_dir`, `bytes_per_s` of each rank's link, `slots` per layer of each
case, `prompt`, `new_tokens`, `skipped`, `reduce_elements`, `out`. Rank 0 writes the rows to `out`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import specmoe_compile
import specmoe_compile.backend
from benchmarks.ranks.limited import limited_links
from specmoe_compile.api import reset_stats
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.records import quantile
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.runtime.session import session_of
from specmoe_compile.system.launched import launched, split_of_ranks

REDUCTIONS = 200


def main(job_path: str) -> None:
    """Run every case of the job."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    rows = [run_case(job, slots) for slots in job["slots"]]
    reduce_us = all_reduce_us(job["reduce_elements"]) if launched().size > 1 else None
    if launched().rank == 0:
        text = json.dumps({"rows": rows, "all_reduce_us": reduce_us})
        Path(job["out"]).write_text(text, encoding="utf-8")


def run_case(job: dict[str, Any], slots: int) -> dict[str, Any]:
    """Load with so many slots per layer and rank, compile, generate twice; times the second."""
    with limited_links(job["bytes_per_s"]):
        model: Any = specmoe_compile.from_pretrained(
            job["model"],
            device="cpu",
            dtype="float32",
            store="disk",
            store_dir=job["store_dir"],
            expert_cache=slots * job["slot_bytes"],
            progress=False,
            **split_of_ranks(),
        )
    compiled = torch.compile(model, backend="specmoe")
    generator = HuggingFaceGenerator(compiled, model, {"cache_implementation": "static"})
    generator.generate(job["prompt"], job["skipped"], TokenClock())
    reset_stats(model)
    clock = TokenClock()
    tokens, _ = generator.generate(job["prompt"], job["new_tokens"], clock)
    spans = clock.intervals_ms[job["skipped"] :]
    own = specmoe_compile.stats(model)
    together = specmoe_compile.stats(model, all_ranks=True)
    row = {
        "ranks": launched().size,
        "slots": slots,
        "experts_per_rank": session_of(model).store.num_experts[0],
        "tpot_ms": {f"p{p}": quantile(spans, p / 100) for p in (20, 50, 80)},
        "mean_ms": sum(spans) / len(spans),
        "hit_rate": together.total.hit_rate,
        "misses": together.total.misses,
        "misses_of_rank_0": own.total.misses,
        "demand_bytes": together.total.demand_bytes,
        "speculative_bytes": together.total.speculative_bytes,
        "tokens": tokens,
    }
    specmoe_compile.close(model)
    torch._dynamo.reset()
    return row


def all_reduce_us(elements: int) -> float:
    """Median time of a sum over the ranks, of so many float32."""
    values, spans = torch.ones(elements), []
    for _ in range(REDUCTIONS):
        began_s = time.perf_counter()
        dist.all_reduce(values)
        spans.append(1e6 * (time.perf_counter() - began_s))
        values.fill_(1.0)
    return quantile(spans, 0.5)


if __name__ == "__main__":
    main(sys.argv[1])
