"""What prefetching one layer ahead could reach at full model size: simulated, not measured.

    python -m benchmarks gpu_full_size_bound full.json --trace full.trace.safetensors

The distance from the limit supposes that all reading and all computing of a token overlap. A
prefetch that looks one layer ahead can hide a layer's reads behind one layer's computing only, and
layers that lack many experts take longer than layers that lack few. This runs the recorded trace
through the runtime's own `ExpertCache`, layer by layer: computing as long as the resident arm
takes, reads one after the other at a fixed rate, predicted records during the computing of the
layer before, what is missing then before the layer's experts run. Once with the recorded
predictions at the rate of an in-graph gather, which is the measured arm, and once with perfect
predictions at the rate of one large copy, which no predictor can beat.

Shape letters: E experts, K top-k, N trace tokens, L MoE layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.full_size.arms import ARMS, Arm
from benchmarks.full_size.report import Results
from benchmarks.full_size.run import STEPS
from benchmarks.full_size.trace import RoutingTrace, map_trace
from benchmarks.kit.command import run_parser
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cuda.prefetch_budget import amounts_to_try

SHARES = (0, 10, 25, 50)
Choices = Sequence[Sequence[Sequence[int]]]
"""Experts by layer and token, heaviest first."""


class Machine(NamedTuple):
    """Times in ms: one record on the link, a layer's computing."""

    record_ms: float
    layer_ms: float


def choices_of(tables: Tensor, top_k: int, which: int) -> Choices:
    """True (0) or predicted (1) experts of a mapped trace, [L, N, 2, E]."""
    found: Choices = tables[:, :, which].topk(top_k, dim=-1).indices.tolist()
    return found


class Decoding:
    """A trace decoded token by token, over and over, on a simulated machine."""

    def __init__(
        self, true: Choices, predicted: Choices, machine: Machine, *, experts: int, arm: Arm
    ) -> None:
        """Begin with an empty cache.

        Args:
            true, predicted: what each layer needs, and what is predicted for it from the layer
                before.
            machine: how long things take.
            experts: E.
            arm: says how many slots a layer has, and whether they keep what they hold.
        """
        self._choices, self._machine, self._keeps = (true, predicted), machine, arm.keeps
        layers = len(true)
        self._sizes: dict[str, Any] = {
            "num_experts": [experts] * layers,
            "slots": [arm.slots(experts, len(true[0][0]))] * layers,
        }
        self._cache = self._empty()
        self.token = 0

    def _empty(self) -> ExpertCache:
        return ExpertCache(**self._sizes, policy="lru")

    def step(self, amount: int) -> float:
        """Simulated ms of the next token, with `amount` records ahead for a layer at most."""
        true, predicted = self._choices
        layers, token = len(true), self.token % len(true[0])
        self.token += 1
        if not self._keeps:
            self._cache = self._empty()
        cache, machine = self._cache, self._machine
        total_ms = ahead_ms = 0.0
        for layer in range(layers):
            total_ms += max(machine.layer_ms, ahead_ms)
            missing = cache.plan(layer, true[layer][token]).fills
            total_ms += len(missing) * machine.record_ms
            ahead_ms = 0.0
            if layer + 1 < layers:
                held = cache.slot_of[layer + 1]
                absent = [e for e in predicted[layer + 1][token] if held[e] < 0]
                cache.plan(layer + 1, absent[:amount], speculative=True)
                ahead_ms = len(absent[:amount]) * machine.record_ms
        return total_ms


def step_times(
    true: Choices, predicted: Choices, machine: Machine, *, experts: int, arm: Arm, amount: int
) -> Iterator[float]:
    """Simulated ms of each token of a trace, see `Decoding`."""
    decoding = Decoding(true, predicted, machine, experts=experts, arm=arm)
    for _ in range(len(true[0])):
        yield decoding.step(amount)


def fastest(
    true: Choices, predicted: Choices, machine: Machine, *, experts: int, arm: Arm
) -> tuple[float, int]:
    """Least mean ms of the tokens that the benchmark times, and the amount ahead that gives it."""

    def mean_ms(amount: int) -> float:
        times = step_times(true, predicted, machine, experts=experts, arm=arm, amount=amount)
        return fmean(list(times)[STEPS.warm_up : STEPS.warm_up + STEPS.timed])

    return min((mean_ms(amount), amount) for amount in amounts_to_try(len(true[0][0])))


def result_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a simulation: a result file and the trace that drove it."""
    parser = run_parser(name, description)
    parser.add_argument("result", type=Path, help="JSON file of benchmarks.full_size.run")
    parser.add_argument("--trace", type=Path, required=True, help="the trace that drove it")
    return parser


def read_models(
    result: Path, trace_file: Path
) -> Iterator[tuple[str, Results, tuple[Choices, Choices]]]:
    """Name, results, true and predicted choices of each model of a result file.

    Raises:
        ValueError: the trace is not the one that drove the run.
    """
    data: Mapping[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    trace = RoutingTrace.load(trace_file)
    for model, about in data["models"].items():
        if about["trace"]["digest"] != trace.digest:
            raise ValueError(
                f"{trace_file} is not the trace of {result}: its digest is {trace.digest},"
                f" expected {about['trace']['digest']}. Give the trace that drove the run."
            )
        sizes = {"layers": about["layers"], "experts": about["experts"], "top_k": about["top_k"]}
        tables = map_trace(trace, **sizes)
        chosen = choices_of(tables, about["top_k"], 0), choices_of(tables, about["top_k"], 1)
        yield model, Results(data, model), chosen


def gathering_machine(results: Results, context: int, layers: int) -> Machine:
    """The measured machine: records at the rate of the in-graph gather."""
    resident_ms = results.p50("resident", "graph", context)
    assert resident_ms is not None, "the caller asks for contexts with a resident arm"
    record_mb = float(results.about["record_bytes"]) / 1e6
    link = results.about["link"]
    return Machine(record_mb / float(link["gather_in_graph_gbps"]), resident_ms / layers)


def contexts_of(results: Results) -> list[int]:
    """Contexts that have a resident arm, which says how long a layer computes."""
    contexts = sorted({int(row["context"]) for row in results.rows})
    return [c for c in contexts if results.row("resident", "graph", c) is not None]


def row_of(
    results: Results, true: Choices, predicted: Choices, context: int, share: int
) -> tuple[str, ...]:
    """Measured, simulated, and with perfect predictions, for one cache size."""
    about, link, experts = results.about, results.about["link"], int(results.about["experts"])
    resident_ms = results.p50("resident", "graph", context)
    assert resident_ms is not None, "the caller asks for contexts with a resident arm"
    name = f"specmoe_{share}" if share else "prefetch_no_cache"
    measured, arm = results.fastest(name, "graph", context), ARMS[name]
    gathering = gathering_machine(results, context, len(true))
    copying = gathering._replace(
        record_ms=float(about["record_bytes"]) / 1e6 / float(link["copy_gbps"])
    )
    ours_ms, amount = fastest(true, predicted, gathering, experts=experts, arm=arm)
    perfect_ms, _ = fastest(true, true, copying, experts=experts, arm=arm)
    nothing: Choices = [[[] for _ in layer] for layer in true]
    reading_ms, _ = fastest(true, nothing, copying._replace(layer_ms=0.0), experts=experts, arm=arm)
    return (
        str(context),
        f"{share} %" if share else "none",
        "-" if measured is None else f"{float(measured['tpot_ms']['p50']):.2f}",
        f"{ours_ms:.2f}",
        str(amount),
        f"{perfect_ms:.2f}",
        f"{perfect_ms / max(reading_ms, resident_ms):.2f}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for every model and context that has a resident arm; returns the status."""
    args = result_parser("gpu_full_size_bound", __doc__).parse_args(arguments)
    for model, results, (true, predicted) in read_models(args.result, args.trace):
        rows = [
            row_of(results, true, predicted, context, share)
            for context in contexts_of(results)
            for share in SHARES
        ]
        print(f"\n{model}, simulated, not measured, but for the column that says so:\n")
        print(
            markdown_table(
                (
                    "context",
                    "cache",
                    "measured ms",
                    "simulated ms",
                    "records ahead",
                    "perfect predictions ms",
                    "their distance",
                ),
                rows,
            )
        )
    return 0
