"""What is predicted for a layer when a trace is replayed.

Shape letters: T tokens, K top-k, P predicted per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from specmoe_compile.replay.steps import ReplaySteps

Prediction = tuple[Tensor, Tensor]
"""Ids [T, P] int64 and weights [T, P] float32."""


class Predictor(Protocol):
    """Predicts the routing of one layer of one step; None where it has nothing to say."""

    def __call__(self, steps: ReplaySteps, step: int, layer: int) -> Prediction | None: ...


def recorded(steps: ReplaySteps, step: int, layer: int) -> Prediction | None:
    """What the run itself predicted, where it did."""
    return steps.predicted(step, layer)


def perfect(steps: ReplaySteps, step: int, layer: int) -> Prediction | None:
    """What the router is going to choose."""
    return steps.routed(step, layer)


def previous(steps: ReplaySteps, step: int, layer: int) -> Prediction | None:
    """What the router chose for the token before."""
    if step == 0:
        return None
    ids, weights = steps.routed(step - 1, layer)
    tokens = steps.tokens[step]
    if len(ids) == tokens:
        return ids, weights
    # After prefill of one sequence, its last token; which rows are a batch's last is not known.
    return (ids[-1:], weights[-1:]) if tokens == 1 else None


PREDICTORS: Mapping[str, Predictor | None] = {
    "none": None,
    "recorded": recorded,
    "perfect": perfect,
    "previous": previous,
}
"""By name; None is no prediction at all, and no cost of one."""
