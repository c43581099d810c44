"""One rank of `python -m benchmarks ranks`: started by torchrun, or alone, with a job's path.

The job is JSON: `model`, `store_dir`, `bytes_per_s` of each rank's link, `slots` per layer of each
case, `prompt`, `new_tokens`, `skipped`, `reduce_elements`, and what a `Group` adds. All cases are
loaded, compiled and warmed up first; then each turn is one `generate` of one case.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import specmoe_compile
import specmoe_compile.backend
from benchmarks.ranks.groups import Turns
from benchmarks.ranks.limited import limited_links
from specmoe_compile.api import reset_stats
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.records import spread
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.hf.attach import session_of
from specmoe_compile.system.launched import launched, split_of_ranks

REDUCTIONS = 200


@dataclass(frozen=True, slots=True)
class Case:
    """A model with so many slots per layer and rank, compiled and warm."""

    slots: int
    model: Any
    generator: HuggingFaceGenerator

    @classmethod
    def opened(cls, job: dict[str, Any], slots: int) -> Case:
        """Load behind the limited link, compile, and generate once as every turn does."""
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
        compiled = torch.compile(model, backend="specmoe", options={"prefetch": True})
        generator = HuggingFaceGenerator(compiled, model, {"cache_implementation": "static"})
        generator.generate(job["prompt"], job["new_tokens"], TokenClock())
        return cls(slots, model, generator)

    def turn(self, job: dict[str, Any]) -> dict[str, Any]:
        """Generate once more: times of the tokens, and what the ranks did meanwhile."""
        reset_stats(self.model)
        clock = TokenClock()
        tokens, _ = self.generator.generate(job["prompt"], job["new_tokens"], clock)
        spans = clock.intervals_ms[job["skipped"] :]
        own = specmoe_compile.stats(self.model)
        together = specmoe_compile.stats(self.model, all_ranks=True)
        return {
            "ranks": launched().size,
            "slots": self.slots,
            "experts_per_rank": session_of(self.model).store.num_experts[0],
            "tpot_ms": spread(spans),
            "mean_ms": sum(spans) / len(spans),
            "hit_rate": together.total.hit_rate,
            "misses": together.total.misses,
            "misses_of_rank_0": own.total.misses,
            "demand_bytes": together.total.demand_bytes,
            "speculative_bytes": together.total.speculative_bytes,
            "tokens": tokens,
        }


def main(job_path: str) -> None:
    """Open every case of the job, then take turns."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    here = launched()
    cases = {slots: Case.opened(job, slots) for slots in job["slots"]}
    turns = Turns(job, here.rank)
    reduce_us = all_reduce_us(job["reduce_elements"]) if here.size > 1 else None
    turns.answer({"all_reduce_us": reduce_us, "threads": torch.get_num_threads()})
    while (ask := turns.next_or_none()) is not None:
        turns.answer(cases[ask["slots"]].turn(job))


def all_reduce_us(elements: int) -> float:
    """Median time of a sum over the ranks, of so many float32."""
    values, spans = torch.ones(elements), []
    for _ in range(REDUCTIONS):
        began_s = time.perf_counter()
        dist.all_reduce(values)
        spans.append(1e6 * (time.perf_counter() - began_s))
        values.fill_(1.0)
    return median(spans)


if __name__ == "__main__":
    main(sys.argv[1])
