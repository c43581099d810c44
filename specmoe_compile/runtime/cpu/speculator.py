"""The speculative path of a session: predict, prefetch, settle, run, correct.

One layer step goes `start` (some layers earlier) -> `settle` -> `run` -> `correct`. Whatever the
prediction was, policy `exact` gives the result of the demand path, bit for bit. A number that is
not the current step's (an op that is run twice, an abandoned step) means that nothing is known: the
step is then done from scratch. Number -1 stands for whatever is current.

Steps of more than MAX_DECODE_TOKENS tokens are prefill: never predicted, always exact.

Shape letters: T tokens, E experts, K top-k, P predicted per token, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from specmoe_compile.options import MAX_DECODE_TOKENS, SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.predict.predictions import Predictions
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.experts import ExpertRunner, Routing, reduce_experts
from specmoe_compile.runtime.cpu.residency import Residency, Step
from specmoe_compile.runtime.policy.amount import take_part
from specmoe_compile.runtime.policy.misses import Choices, MissPolicy, weak_misses
from specmoe_compile.runtime.policy.prefetch_judge import PrefetchJudge
from specmoe_compile.runtime.transfer.base import Issued

_REST = 4
"""Steps per one that learns default vectors, where nothing is predicted from them now."""
_NOBODY = 0
_CURRENT = -1


class _Prediction:
    """What `start` was told about a layer, in values of our own: graphs reuse their buffers."""

    __slots__ = ("issued", "number", "ranks", "rows", "weights")

    def __init__(self, number: int, rows: list[list[int]], weights: Tensor | None) -> None:
        self.number = number
        self.rows = rows
        self.weights = weights
        self.issued: Issued | None = None
        self.ranks: dict[int, int] | None = None


class _State:
    """One layer step between `settle` and `correct`.

    Attributes:
        step: None until it is known which experts are needed.
        prediction: what to commit to; None in an exact step.
        ids, weights: the routing that is executed where it is not the router's own.
        filled: experts whose rows hold default vectors instead of outputs.
        routing: of what is executed; None until `run` was called.
    """

    __slots__ = ("filled", "ids", "layer", "number", "prediction", "routing", "step", "weights")

    def __init__(self, number: int, layer: int) -> None:
        self.number = number
        self.layer = layer
        self.step: Step | None = None
        self.prediction: _Prediction | None = None
        self.ids: Tensor | None = None
        self.weights: Tensor | None = None
        self.filled: tuple[int, ...] = ()
        self.routing: Routing | None = None


class Speculator:
    """Runs layer steps, with or without predictions. Callers serialise their calls.

    Attributes:
        config: options, as `use_options` took them between steps.
        misses: what they say of misses.
        default_vectors: means of outputs.
        predictions: told what every layer chooses.
        judge: turns predictions off that do not pay.
    """

    def __init__(
        self,
        residency: Residency,
        runners: Sequence[ExpertRunner],
        stats: Sequence[LayerStats],
        vectors: DefaultVectors,
    ) -> None:
        self.use_options(SessionOptions())
        self.default_vectors = vectors
        self.predictions = Predictions(len(runners))
        self.residency = residency
        self.judge = PrefetchJudge(len(runners))
        # Decoding learns default vectors only once a graph that uses them was configured.
        self.learns_from_decode = False
        self._runners = runners
        self._stats = stats
        self._numbers = itertools.count(1)
        self._predictions: list[_Prediction | None] = [None] * len(runners)
        # Whether the next prediction of a layer is wanted; None where nobody asked.
        self._asked: list[bool | None] = [None] * len(runners)
        self._learning_turn = 0  # steps until one learns
        self._state: _State | None = None

    def use_options(self, options: SessionOptions) -> None:
        """Take the options from now on."""
        self.config = options
        self.misses = MissPolicy(options)

    def use(self, residency: Residency) -> None:
        """Run from another residency from now on; what was predicted is forgotten."""
        self._abandon()
        self._predictions = [None] * len(self._predictions)
        self.residency = residency

    def demand(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One layer without speculation: [T, H], [T, K], [T, K] -> [T, H]."""
        self._abandon()
        self.predictions.note(layer, ids)
        runner = self._runners[layer]
        routing = Routing(x, ids, runner)
        step = self.residency.begin(layer, routing.experts, prompt=_prompt_or_none(ids))
        try:
            y = runner.new_outputs(x, ids)
            self._compute(step, routing, y, block=True)
        finally:
            self.residency.finish(step)
        self._learn(layer, ids, y, routing.experts, rest=_REST)
        return reduce_experts(y, weights, x)

    def plan(self, layers: Sequence[int], edges: Sequence[int], ids: Tensor) -> list[bool]:
        """Which layers take part in a step: those to predict, and those they are predicted from.

        A `start` that follows keeps to the answer.

        Args:
            layers: MoE layer ordinals.
            edges: pairs in one list: a layer, and one that can be predicted from it.
            ids: [T, K], the experts of the first of `layers`; here they decide nothing.
        """
        targets = set(edges[1::2])
        for target in targets:
            self._asked[target] = self._wants(target)
        return take_part(layers, edges, {target for target in targets if self._asked[target]})

    def start(self, layer: int, ids: Tensor, weights: Tensor) -> int:
        """Take a prediction, ids and weights [T, P], and prefetch by it; returns its number."""
        number = next(self._numbers)
        self._predictions[layer] = None
        asked, self._asked[layer] = self._asked[layer], None
        if not 0 < ids.shape[0] <= MAX_DECODE_TOKENS:
            return number
        if not (self._wants(layer) if asked is None else asked):
            return number
        config = self.config
        rows: list[list[int]] = ids.tolist()
        prediction = _Prediction(number, rows, weights.clone() if self.misses.commits else None)
        self._predictions[layer] = prediction
        experts = self.misses.worth_fetching(rows, weights.tolist())
        experts = admitted = [e for e in experts if 0 <= e < self._runners[layer].num_experts]
        if self._is_judged():
            admitted, prediction.ranks = self.judge.admitted(layer, experts, len(rows[0]))
        prediction.issued = self.residency.prefetch(
            layer, admitted, predicted=experts, budget_bytes=config.prefetch_budget_bytes
        )
        return number

    def _is_judged(self) -> bool:
        # What is committed to is never read in vain; and off, a step would have to be exact.
        return self.config.auto_off and not self.misses.commits

    def _wants(self, layer: int) -> bool:
        if self.config.skips(layer):
            return False
        return not self._is_judged() or self.judge.predicts(layer)

    def settle(self, number: int, layer: int, ids: Tensor) -> int:
        """Meet a prediction with the true ids [T, K]; returns the number of the step.

        Promotes the reads that are wanted, cancels the others, and issues the reads that are
        missing, unless which ones these are depends on the router weights.
        """
        self._abandon()
        self.predictions.note(layer, ids)
        state = self._state = _State(next(self._numbers), layer)
        prediction, self._predictions[layer] = self._predictions[layer], None
        tokens = ids.shape[0]
        if not 0 < tokens <= MAX_DECODE_TOKENS:
            return state.number
        runner = self._runners[layer]
        rows: list[list[int]] = [runner.own(row) for row in ids.tolist()]
        needed = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        known = prediction is not None and number in (prediction.number, _CURRENT)
        if prediction is not None and known and len(prediction.rows) == tokens:
            self._count_recall(layer, rows, prediction.rows)
            if prediction.issued is not None and prediction.ranks is not None:
                pushed_out = self.judge.measure(
                    layer, prediction.issued, prediction.ranks, set(needed)
                )
                self.residency.note_pushed_out(layer, pushed_out)
            guessed = prediction.weights if self.misses.commits else None
            if guessed is not None and guessed.numel():
                state.prediction = prediction
                self.residency.settle(layer, set(itertools.chain.from_iterable(prediction.rows)))
                return state.number
        if self.misses.needs_weights(layer):
            self.residency.settle(layer, set(needed))
            return state.number
        runner.check_ids(needed)
        state.step = self.residency.begin(layer, needed)
        return state.number

    def run(self, number: int, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute what is there, [T, H] -> [T, K, H], unweighted; never blocks."""
        state = self._current(number, layer, ids)
        runner = self._runners[layer]
        y = runner.new_outputs(x, ids)
        if state.prediction is not None:
            assert state.prediction.weights is not None, "settle() keeps no other"
            predicted = Choices(ids.new_tensor(state.prediction.rows), state.prediction.weights)
            state.ids, state.weights = self.misses.committed(predicted, Choices(ids, weights))
            self._stats[layer].skipped_experts += _count_missing(ids, state.ids, runner)
        routing = Routing(x, ids if state.ids is None else state.ids, runner)
        if state.step is None:
            needed = self._needed(state, routing, ids, weights, y)
            state.step = self.residency.begin(layer, needed, prompt=_prompt_or_none(ids))
        state.routing = routing
        self._compute(state.step, routing, y, block=False)
        return y

    def correct(
        self, number: int, layer: int, partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Compute the rest of `partial`, [T, K, H], and sum over K: -> [T, H]."""
        state = self._state
        known = state is not None and number in (state.number, _CURRENT) and state.layer == layer
        if state is None or not known or state.routing is None or state.step is None:
            return self.demand(layer, x, ids, weights)
        ids, routing = ids if state.ids is None else state.ids, state.routing
        try:
            y = partial
            if state.step.waiting or state.step.deferred:
                y = partial.clone()  # an op must not write to its arguments
                self._compute(state.step, routing, y, block=True)
        finally:
            self._abandon()
        filled = state.filled
        self._learn(layer, ids, y, [e for e in routing.experts if e not in filled])
        return reduce_experts(y, weights if state.weights is None else state.weights, x)

    def _current(self, number: int, layer: int, ids: Tensor) -> _State:
        """Return the step of that number if it is the live one and not run yet, else a new one."""
        state = self._state
        known = state is not None and number in (state.number, _CURRENT) and state.layer == layer
        if state is None or not known or state.routing is not None:
            self.settle(_NOBODY, layer, ids)
            state = self._state
            assert state is not None, "settle leaves a live step"
            state.number = number if number >= 0 else state.number
        return state

    def _needed(
        self, state: _State, routing: Routing, ids: Tensor, weights: Tensor, y: Tensor
    ) -> list[int]:
        """Return the experts to fetch and run; gives the others' rows of `y` default vectors."""
        threshold = self.misses.threshold
        if threshold is None or ids.shape[0] > MAX_DECODE_TOKENS:
            return routing.experts
        absent = self.residency.absent(state.layer, routing.experts)
        if not absent:
            return routing.experts
        flat_ids: list[int] = ids.reshape(-1).tolist()
        state.filled = weak_misses(absent, flat_ids, weights.reshape(-1).tolist(), threshold)
        table = self.default_vectors.tables[state.layer]
        rows = y.view(-1, y.shape[-1])
        for row, expert in enumerate(flat_ids):
            if expert in state.filled:
                rows[row] = table[expert]
        self._stats[state.layer].skipped_experts += len(state.filled)
        return [expert for expert in routing.experts if expert not in state.filled]

    def _compute(self, step: Step, routing: Routing, y: Tensor, *, block: bool) -> None:
        """Compute a step's experts into `y`, [T, K, H]; without `block` those that are there."""
        flat, runner = y.view(-1, y.shape[-1]), self._runners[step.layer]
        if step.ready:
            routing.compute(step.ready, runner, flat)
            step.ready.clear()
        while (arrival := self.residency.next_or_none(step, block=block)) is not None:
            routing.compute((arrival,), runner, flat)

    def _learn(
        self, layer: int, ids: Tensor, y: Tensor, experts: Sequence[int], *, rest: int = 1
    ) -> None:
        if ids.shape[0] <= MAX_DECODE_TOKENS:
            if not self.learns_from_decode:
                return
            # One layer per step (or per `rest` steps), in turn: the next time it is the next one.
            self._learning_turn -= 1
            if self._learning_turn >= 0:
                return
            self._learning_turn = rest * len(self._runners)
        if experts:
            self.default_vectors.update(layer, ids, y, experts)

    def _abandon(self) -> None:
        """End the live step, if there is one, complete or not."""
        state, self._state = self._state, None
        if state is not None and state.step is not None:
            self.residency.finish(state.step)

    def _count_recall(
        self, layer: int, rows: Sequence[list[int]], predicted: Sequence[list[int]]
    ) -> None:
        stats, runner = self._stats[layer], self._runners[layer]
        for true, all_guessed in zip(rows, predicted, strict=True):
            guess = runner.own(all_guessed)
            stats.needed += len(true)
            stats.predicted += len(guess)
            stats.recalled += len(set(true).intersection(guess))


def _prompt_or_none(ids: Tensor) -> Tensor | None:
    """The ids of a step that is prefill."""
    return ids if ids.shape[0] > MAX_DECODE_TOKENS else None


def _count_missing(ids: Tensor, executed: Tensor, runner: ExpertRunner) -> int:
    """Count the (token, expert) pairs of `ids` that are not in the same row of `executed`."""
    pairs = zip(ids.tolist(), executed.tolist(), strict=True)
    return sum(len(set(runner.own(true)).difference(done)) for true, done in pairs)
