"""How one arm of the full-size benchmark is measured.

Every arm runs the same steps on the same model: forced random tokens, so that a random model does
not fall into a loop, from the same place of the same trace, after the same context. So arms with
policy `exact` must give the same tokens, and the report compares them.

Shape letters: N steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.full_size.arms import (
    ARMS,
    Arm,
    Bench,
    Mode,
    Routing,
    SlotLimit,
    cuda_engine,
    free_memory,
    sharing_groups,
)
from benchmarks.full_size.model import FilledCache, random_tokens
from benchmarks.full_size.profile import profile_steps
from benchmarks.full_size.routing import TracedRouting, trace_predictions
from benchmarks.kit.turns import turn
from specmoe_compile.bench.records import spread
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.runtime.session import Session
from specmoe_compile.system.output import sentence, user_error_or_none

MAX_TRIAL_PASSES = 9
"""How often a run goes through its steps before, at most, where the session finds out by trying how
many records to fetch ahead. Most trials are over after 200 to 400 steps, the longest after 1009."""


COMPILING_STEPS = 4
"""After which a step is compiled and captured."""


class Run:
    """Steps of a compiled model; `step` never waits for the device."""

    def __init__(
        self,
        bench: Bench,
        compiled: Any,
        session: Session | None,
        routing: TracedRouting,
        filled: FilledCache,
    ) -> None:
        """Tie the parts together; a model that holds its experts has no session."""
        config = bench.shape.configured(bench.layers)
        tokens = random_tokens(config.vocab_size, bench.steps.total, bench.device)
        self._inputs = [tokens[:, i : i + 1].contiguous() for i in range(bench.steps.total)]
        self._parts = (bench, compiled, session, routing, filled)
        self._cache = cache_argument(compiled, filled.cache)
        self._empties: SlotLimit | None = None
        self.chosen: list[Tensor] = []

    def start(self, driven: bool, arm: Arm | None = None) -> None:
        """Begin again, with the slots of an arm: empty, unless the arm has all experts."""
        bench, _, session, _, _ = self._parts
        self._empties = None
        if session is not None and arm is not None:
            limit = SlotLimit(session, bench.slots(arm))
            limit.empty()
            self._empties = None if arm.keeps else limit
        self.rewind(driven)

    def rewind(self, driven: bool) -> None:
        """Go back to the first token; slots keep what they hold, as between two texts."""
        *_, routing, filled = self._parts
        filled.rewind()
        routing.start(driven)
        self.chosen = []

    def step(self) -> None:
        """One token."""
        _, compiled, _, routing, filled = self._parts
        filled.hold()
        logits = compiled(self._inputs[len(self.chosen)], **self._cache).logits
        self.chosen.append(logits[:, -1].argmax(-1).clone())
        routing.advance()
        if self._empties is not None:
            self._empties.empty()

    @property
    def tokens(self) -> list[int]:
        """What was chosen so far; waits for the device."""
        return [int(token) for token in torch.cat(self.chosen).tolist()]


class Steppable(Protocol):
    """What can be timed."""

    def step(self) -> object:
        """One token."""


def step_times_ms(run: Steppable, count: int, device: torch.device) -> list[float]:
    """Time of each of `count` steps on the device, the host running ahead as it does."""
    if device.type == "cpu":
        times: list[float] = []
        for _ in range(count):
            started = time.perf_counter()
            run.step()
            times.append((time.perf_counter() - started) * 1e3)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run.step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


@torch.no_grad()
def measure_arms(
    bench: Bench,
    names: Sequence[str],
    mode: Mode,
    context: int,
    routings: tuple[Routing, ...],
    *,
    trace_file: Callable[[str, str], Path | None] = lambda arm, routing: None,
) -> Iterator[dict[Routing, dict[str, Any]]]:
    """Measure arms that share a compiled graph, in one mode at one context; a row per routing.

    An arm that the session refuses, or that does not fit, gets rows that say so. An arm that
    neither keeps experts nor speculates fetches K experts per layer whatever the routing is, and
    is measured under the first one only.
    """
    free_memory(bench.device)
    fitting: list[str] = []
    for name in names:
        reason = bench.fits(ARMS[name], context)
        if mode == "eager" and ARMS[name].speculates:
            reason = "speculation is a rewrite of the compiled graph"
        if reason is None:
            fitting.append(name)
        else:
            yield {r: {**_head(name, mode, context, r), "not_run": reason} for r in routings}
    done: set[str] = set()
    try:
        for name, rows in _measured(bench, fitting, mode, context, routings, trace_file):
            done.add(name)
            yield rows
    except Exception as error:
        inner = getattr(error, "inner_exception", error)  # torch.compile wraps what it meets
        out_of_memory = isinstance(inner, torch.OutOfMemoryError)
        known = inner if out_of_memory else user_error_or_none(error)
        if known is None:
            raise
        reason = sentence(known)
        for name in fitting:
            if name not in done:
                yield {r: {**_head(name, mode, context, r), "not_run": reason} for r in routings}


def _head(name: str, mode: Mode, context: int, routing: Routing) -> dict[str, Any]:
    summary = ARMS[name].summary
    return {
        "arm": name,
        "mode": mode,
        "context": context,
        "summary": summary,
        "routing": routing,
    }


def _measured(
    bench: Bench,
    names: Sequence[str],
    mode: Mode,
    context: int,
    routings: tuple[Routing, ...],
    trace_file: Callable[[str, str], Path | None],
) -> Iterator[tuple[str, dict[Routing, dict[str, Any]]]]:
    if not names:
        return
    arms = [ARMS[name] for name in names]
    experts, top_k = bench.store.num_experts[0], bench.store.top_k
    groups = sharing_groups(names, mode, experts=experts, top_k=top_k)
    if len(groups) > 1:
        raise ValueError(f"these arms cannot share a graph: {groups}; measure them one by one.")
    steps = bench.steps
    own = arms[0].graph_options(bench.store.layouts[0].record_bytes)
    options: dict[str, Any] = {"lowering": bench.lowering, "strict": True, **own}
    if mode == "graph":
        options["mode"] = "reduce-overhead"
    # The paper's copies by the host; not where slots were filled behind the host's back.
    copies = mode == "compiled" and not any(arm.full for arm in arms)
    options["transfer"] = "copy" if copies else "gather"
    slots = max(bench.slots(arm) for arm in arms)
    opened = bench.opened(slots, cache_policy=arms[0].cache_policy)
    with opened as (model, session, routing), trace_predictions():
        filled = FilledCache(model.config, context, steps.total, bench.device, bench.shape.dtype)
        compiled = model
        if mode != "eager":
            compiled = torch.compile(model, backend="specmoe", options=options, fullgraph=True)
        run = Run(bench, compiled, session, routing, filled)
        torch._dynamo.utils.counters.clear()
        for name, arm in zip(names, arms, strict=True):
            wanted = routings if arm.keeps or arm.speculates else routings[:1]
            rows: dict[Routing, dict[str, Any]] = {}
            for kind in wanted:
                if bench.turns is not None:
                    run.start(kind == "trace", arm)
                    for _ in range(COMPILING_STEPS):
                        run.step()
                    _synchronise(bench.device)
                with turn(bench.turns):
                    timed = _timed(bench, run, session, kind, arm, trace_file(name, kind))
                    _synchronise(bench.device)
                rows[kind] = {
                    **_head(name, mode, context, kind),
                    "slots": bench.slots(arm),
                    "slots_allocated": slots,
                    "policy": arm.options.get("policy", "exact"),
                    **timed,
                    "transfer": cuda_engine(session).transfer,
                    "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
                }
            yield name, rows


def _timed(
    bench: Bench,
    run: Run,
    session: Session,
    kind: Routing,
    arm: Arm,
    trace_file: Path | None,
) -> dict[str, Any]:
    """Warm up, time and profile one arm under one routing."""
    steps = bench.steps
    cuda_engine(session).budget.restart()
    trial_steps = _try_amounts(run, session, kind, arm, steps.total) if arm.tries else 0
    run.start(kind == "trace", arm)
    started = time.perf_counter()
    for _ in range(steps.warm_up):
        run.step()
    _synchronise(bench.device)
    warm_up_s = time.perf_counter() - started
    session.reset_stats()
    times = step_times_ms(run, steps.timed, bench.device)
    counted = _counters(session, steps.timed)
    profiled = profile_steps(run.step, steps.profiled, device=bench.device, trace_file=trace_file)
    return {
        "tpot_ms": spread(times),
        "tokens_per_s": 1e3 / median(times),
        **counted,
        **profiled,
        "tokens": run.tokens,
        "warm_up_s": warm_up_s,
        "steps": [steps.warm_up, steps.timed, steps.profiled],
        "prefetch_records": cuda_engine(session).budget.records if arm.speculates else None,
        "trial_steps": trial_steps,
    }


def _try_amounts(run: Run, session: Session, kind: Routing, arm: Arm, count: int) -> int:
    """Go through the `count` steps until a trial has ended; how many steps that took."""
    run.start(kind == "trace", arm)
    steps = 0
    while True:
        for _ in range(count):
            run.step()
        steps += count
        if cuda_engine(session).budget.found or steps == MAX_TRIAL_PASSES * count:
            return steps
        # A cache that is empty again would slow down the amounts that are tried next.
        run.rewind(kind == "trace")


def _counters(session: Session, steps: int) -> dict[str, Any]:
    total = session.stats.total
    needed = total.demand_bytes + total.useful_speculative_bytes
    return {
        "hit_rate": total.hits / max(1, total.hits + total.misses),
        "demand_bytes": total.demand_bytes / steps,
        "speculative_bytes": total.speculative_bytes / steps,
        "missed_bytes": needed / steps,
        "skipped_experts": total.skipped_experts / steps,
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
