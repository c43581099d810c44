"""One compiled model that generates over and over, and what one arm of it takes.

`generate` runs greedy, with a streamer and a token that ends the text, so that each token is read.
Wall times are from one token at the streamer to the next. Device times are the time that at least
one kernel or copy covers, from a profiled run, per token.
"""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

from benchmarks.full_size.arms import ARMS, Bench, SlotLimit
from benchmarks.full_size.clock import Clock
from benchmarks.full_size.model import SEED, FilledCache
from benchmarks.full_size.profile import SYNCHRONISATIONS, covered_us, is_transfer
from specmoe_compile.bench.records import spread
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.hf.run_ahead import generation_stats, reset_generation_stats

SKIPPED = 16
"""First tokens of a run that are not timed: the cache of experts begins empty."""
MAX_TRIAL_RUNS = 9
COUNTED_TOKENS = 8
TABLE_ROWS = 40


class Advance(LogitsProcessor):
    """Moves the trace on by a token, on the device; changes no score.

    With `empties` it empties their slots too: a machine without a cache keeps nothing.
    """

    def __init__(self, routing: Any, filled: FilledCache, empties: SlotLimit | None) -> None:
        self._routing, self._filled, self._empties = routing, filled, empties
        filled.cache.__class__ = LentCache

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._routing.advance()
        if self._empties is not None:
            self._empties.empty()
        return scores


class LentCache(StaticCache):
    """A cache that nobody looks at after a run: `FilledCache` rewinds it before the next one.

    To `generate` it is as its own, so that a step too many need not be undone. Models with sliding
    windows could not undo it, and would run one step after the other, as no user's call does that
    leaves the cache to `generate`.
    """

    @property
    def _is_user_defined(self) -> bool:
        return False

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        """transformers says that the caller made it."""


class Generation:
    """`generate` of one compiled model, over and over from the same context."""

    def __init__(
        self, bench: Bench, compiled: Any, session: Any, routing: Any, filled: FilledCache
    ) -> None:
        """Tie the parts together."""
        self._bench, self._compiled, self.session = bench, compiled, session
        self._routing, self._filled = routing, filled
        self._empties: SlotLimit | None = None
        filled.cache.__class__ = LentCache
        vocabulary = bench.shape.configured(bench.layers).vocab_size
        generator = torch.Generator().manual_seed(SEED)
        length = filled.context + 1
        self._prompt = torch.randint(2, vocabulary, (1, length), generator=generator)
        self._prompt = self._prompt.to(bench.device)
        self._last = vocabulary - 1

    def start(self, arm_name: str) -> None:
        """Begin an arm: slots empty, or all experts in their place."""
        arm = ARMS[arm_name]
        limit = SlotLimit(self.session, self._bench.slots(arm))
        limit.empty()
        self._empties = None if arm.keeps else limit

    def run(self, count: int) -> tuple[list[int], list[float]]:
        """Generate `count` tokens; the tokens, and when each was there."""
        self._filled.rewind()
        self._routing.start(True)
        clock = Clock()
        out = self._compiled.generate(
            self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=self._last,
            pad_token_id=0,
            streamer=clock,
            logits_processor=LogitsProcessorList(
                [Advance(self._routing, self._filled, self._empties)]
            ),
            **cache_argument(self._compiled, self._filled.cache),
        )
        return out[0, self._prompt.shape[1] :].tolist(), clock.times


def measure_cell(bench: Bench, run: Generation, name: str) -> dict[str, Any]:
    """One arm: trials, timed tokens, profiled tokens."""
    steps, arm = bench.steps, ARMS[name]
    run.session.engine.budget.restart()
    run.start(name)
    trials = 0
    while arm.tries and trials < MAX_TRIAL_RUNS and not run.session.engine.budget.found:
        run.run(steps.total)
        trials += 1
    run.start(name)
    run.run(steps.warm_up)  # fills the slots, and is not timed
    run.session.reset_stats()
    reset_generation_stats(run.session)
    skipped = min(SKIPPED, steps.warm_up)
    tokens, times = run.run(steps.warm_up + steps.timed)
    spans = [1e3 * (b - a) for a, b in zip(times[skipped:], times[skipped + 1 :], strict=False)]
    counted = run.session.stats.total
    generation = generation_stats(run.session)
    return {
        "wall_ms": spread(spans),
        "tokens_timed": len(spans),
        "hit_rate": counted.hits / max(1, counted.hits + counted.misses),
        "missed_bytes_per_token": (counted.demand_bytes + counted.useful_speculative_bytes)
        / max(1, len(times)),
        "slots_bytes": bench.slots(arm) * sum(item.record_bytes for item in bench.store.layouts),
        "store_bytes": bench.store.total_bytes,
        "gpu_bytes": _reserved(bench),
        "prefetch_records": run.session.engine.budget.records if arm.speculates else None,
        "trial_runs": trials,
        "generation": {
            "tokens": generation.tokens,
            "ahead": generation.ahead,
            "dropped": generation.dropped,
            "reason": generation.reason,
        },
        "tokens": tokens,
        **_profiled(bench, run),
        "host": _host_calls(bench, run),
    }


def _profiled(bench: Bench, run: Generation) -> dict[str, Any]:
    """Device time per token and kernel by kernel, of a run under the profiler."""
    if bench.device.type != "cuda":
        return {"device_ms": None, "kernels": []}
    count = bench.steps.profiled + 2
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run.run(count)
        torch.cuda.synchronize()
    events = [
        {
            "name": event.name,
            "cat": "kernel",
            "ts": event.time_range.start,
            "dur": event.time_range.elapsed_us(),
        }
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    layers = bench.shape.configured(bench.layers).num_hidden_layers
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event["name"][:110], []).append(event["dur"])
    rows = [
        {
            "kernel": name,
            "per_token": len(spans) / count,
            "us_each": median(spans),
            "us_per_layer": sum(spans) / count / layers,
            "ms_per_token": sum(spans) / count / 1e3,
        }
        for name, spans in by_name.items()
    ]
    rows.sort(key=lambda row: -float(row["ms_per_token"]))
    own = [event for event in events if not is_transfer(event)]
    return {
        "device_ms": covered_us(events) / count / 1e3,
        "device_without_transfers_ms": covered_us(own) / count / 1e3,
        "kernels": rows[:TABLE_ROWS],
    }


def _reserved(bench: Bench) -> int | None:
    """What PyTorch holds of the GPU's memory, graphs included; the slots of the largest arm."""
    return torch.cuda.memory_reserved(bench.device) if bench.device.type == "cuda" else None


def _host_calls(bench: Bench, run: Generation) -> dict[str, float] | None:
    """Calls per token that launch or wait, and copies to the host, of one run of `generate`.

    What `generate` does once, before its first step, is in it: compare two lengths of runs.
    """
    if bench.device.type != "cuda":
        return None
    counts: list[Counter[str]] = []
    for length in (COUNTED_TOKENS, 2 * COUNTED_TOKENS):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run.run(length)
            torch.cuda.synchronize()
        counts.append(Counter(event.name for event in profiler.events()))
    few, many = counts
    kept = {*SYNCHRONISATIONS, "cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel"}
    names = [n for n in many if n in kept or n == "cuLaunchKernelEx" or "DtoH" in n]
    return {name: (many[name] - few[name]) / COUNTED_TOKENS for name in sorted(names)}
