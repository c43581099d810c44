"""Decides which predictions are worth their while, from what earlier ones saved and cost.

Two questions, each with a `PrefetchGate`: is a layer to be predicted at all, and are guesses of a
rank to be read. The rank of a guess is its place among the predicted experts, heaviest first: heavy
ones are nearly always right, light ones often not, and only a measurement tells which still pay on
a given disk and cache. Over both is a `StepTrial`: do steps with what is left of the predictions
take less time than steps without any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from specmoe_compile.runtime.residency import Issued, Residency
from specmoe_compile.runtime.speculation import LAYER_MARGIN, RARE_MARGIN, TRIAL_STEPS, PrefetchGate
from specmoe_compile.runtime.stats import LayerStats
from specmoe_compile.runtime.step_clock import StepClock
from specmoe_compile.runtime.step_trial import StepTrial
from specmoe_compile.runtime.transfer.base import DONE, RUNNING

_SHARE_BESIDE = 0.5
"""Of the link, for a guess that is read beside one read that the host waits for."""


class PrefetchJudge:
    """Gates of every layer, and what they are told.

    Attributes:
        layers: of each layer, whether it is predicted.
        ranks: of each layer, by rank, whether such a guess is read.
        clock: what a predicted layer costs the host.
        trial: whether steps with all that the gates admit are faster than steps without.
    """

    def __init__(self, layers: int, now_s: Callable[[], float]) -> None:
        """Start with every gate open; `now_s` is the clock that reads are timed with."""
        self.layers = [PrefetchGate() for _ in range(layers)]
        self.ranks: list[list[PrefetchGate]] = [[] for _ in range(layers)]
        self.clock = StepClock(now_s)
        self.trial = StepTrial()
        self._lacking = [float("inf")] * layers
        self._lacked_bytes = 0

    def begin_step(self, predicted: int, stats: Sequence[LayerStats]) -> None:
        """Time a step with that many predicted layers, from here to `end_step`."""
        self._lacked_bytes = _lacked_bytes(stats)
        self.clock.begin(predicted, _stalled_ms(stats))

    def end_step(self, stats: Sequence[LayerStats]) -> None:
        """Take in how long the step took that began, if one did."""
        step_ms = self.clock.end(_stalled_ms(stats))
        lacked_bytes = _lacked_bytes(stats) - self._lacked_bytes
        if step_ms is not None and lacked_bytes >= 0:
            self.trial.end(step_ms, lacked_bytes)

    def admitted(
        self, layer: int, experts: Sequence[int], width: int
    ) -> tuple[list[int], dict[int, int]]:
        """Choose the guesses to read.

        Args:
            layer: MoE layer ordinal.
            experts: distinct guesses, the most wanted first.
            width: guesses per token.

        Returns:
            Those whose ranks pay, in the same order; and the rank of every guess.
        """
        gates = self.ranks[layer]
        while len(gates) < width:
            gates.append(PrefetchGate())
        # A batch has more guesses than a token has: its ranks are those of one token, stretched.
        most = max(width, len(experts))
        ranks = {expert: place * width // most for place, expert in enumerate(experts)}
        is_open = [gate.admits() for gate in gates[:width]]
        return [expert for expert in experts if is_open[ranks[expert]]], ranks

    def measure(
        self,
        layer: int,
        issued: Issued,
        ranks: dict[int, int],
        wanted: Collection[int],
        *,
        host_ms: float,
        residency: Residency,
    ) -> None:
        """Take in what one prediction saved and lost, see `PrefetchGate`.

        Args:
            layer: MoE layer ordinal.
            issued: the reads of the prediction.
            ranks: rank of each guess.
            wanted: the experts that the layer needs.
            host_ms: how long the lookahead kept the host from other work; what the clock says
                counts if it is more.
            residency: where the experts are read to.
        """
        absent = residency.absent(layer, list(wanted))
        saved_s, lost_s, useless = _gains(layer, issued, wanted, absent, residency)
        margin = self._margin(layer, len(issued.reads) - len(useless) + len(absent))
        # The oldest victims would have gone for the useful records anyway.
        victims = issued.victims[len(issued.reads) - len(useless) :]
        pushed_out = {v: ranks[e] for v, e in zip(victims, reversed(useless), strict=False)}
        regret_s = residency.take_regret(layer, pushed_out)
        by_rank: dict[int, list[float]] = {}
        for expert in issued.reads:
            sums = by_rank.setdefault(ranks[expert], [0.0, 0.0])
            sums[0] += saved_s.get(expert, 0.0)
            sums[1] += lost_s.get(expert, 0.0)
        certain_s = 0.0
        for rank, gate in enumerate(self.ranks[layer]):
            saved, lost = by_rank.get(rank, (0.0, 0.0))
            lost += regret_s.get(rank, 0.0)
            if gate.is_tried:
                certain_s += lost
            if rank in by_rank or (lost and gate.is_open):
                gate.measure(saved * 1e3, lost * 1e3)
        host_ms = max(host_ms, self.clock.cost_ms)
        # A layer does not answer for ranks on trial: those that lose will be turned off alone.
        lost_ms = certain_s * 1e3 + host_ms
        self.layers[layer].measure(sum(saved_s.values()) * 1e3, lost_ms, margin=margin)

    def _margin(self, layer: int, lacking: int) -> float:
        """How many times its losses a layer has to save; from the experts that its steps lack."""
        mean = self._lacking[layer]
        mean = lacking if math.isinf(mean) else mean + (lacking - mean) / TRIAL_STEPS
        self._lacking[layer] = mean
        return LAYER_MARGIN if mean >= 1 else RARE_MARGIN


def _stalled_ms(stats: Sequence[LayerStats]) -> float:
    return sum(layer.stall_ms for layer in stats)


def _lacked_bytes(stats: Sequence[LayerStats]) -> int:
    return sum(layer.lacked_bytes for layer in stats)


def _gains(
    layer: int,
    issued: Issued,
    wanted: Collection[int],
    absent: Collection[int],
    residency: Residency,
) -> tuple[dict[int, float], dict[int, float], list[int]]:
    """Seconds that each useful read saved, that each useless one costs, and the useless experts."""
    if not issued.reads:
        return {}, {}, []
    now_s = residency.now_s()
    reads = {expert: read for expert, read in issued.reads.items() if read.state in (RUNNING, DONE)}
    spans = {e: (r.started_s, min(now_s, r.finished_s or now_s)) for e, r in reads.items()}
    saved_s: dict[int, float] = {}
    lost_s: dict[int, float] = {}
    if spans:
        # Reads side by side share the disk: together they saved no more than the time they took.
        # Beside a read that the host waits for, they held that one up by what they saved.
        first_s = min(start for start, _ in spans.values())
        last_s = max(end for _, end in spans.values())
        idle_s = max(0.0, last_s - first_s - residency.stalled_s(first_s, last_s))
        share = min(1.0, idle_s / max(1e-9, sum(end - start for start, end in spans.values())))
        saved_s = {e: (end - start) * share for e, (start, end) in spans.items() if e in wanted}
        lost_s = {
            e: _SHARE_BESIDE * residency.stalled_s(*spans[e]) for e in spans if e not in wanted
        }
    useless = [expert for expert in issued.reads if expert not in wanted]
    # What still runs holds up the reads that the layer waits for, if there are any.
    all_there = not absent and all(
        read.state == DONE for expert, read in issued.reads.items() if expert in wanted
    )
    for expert in useless:
        if expert in reads and reads[expert].state == RUNNING and not all_there:
            left_s = residency.read_s(layer) - (now_s - reads[expert].started_s)
            lost_s[expert] += max(0.0, left_s)
    return saved_s, lost_s, useless
