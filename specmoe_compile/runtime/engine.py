"""What a session asks of the device that runs its layers.

Shape letters: T tokens, K top-k, P predicted per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from specmoe_compile.options import CompileOptions, SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.predict.predictions import Predictions
from specmoe_compile.runtime.cache.statistics import Stats


class DirectSteps(Protocol):
    """Layer steps that an engine takes without the session, in native code."""

    @property
    def lock(self) -> AbstractContextManager[None]:
        """Held by whoever takes a step; may be taken again by who has it."""

    def enter(self, handle: int) -> None:
        """Take the steps of the session with this handle."""

    def turn_off(self, off: bool) -> None:
        """Leave all steps to the session, or take them again."""

    def renew_after_fork(self) -> None:
        """In a forked process: forget the parent's threads and who had the lock."""


class Engine(Protocol):
    """Takes the steps of a model's MoE layers on one device; its session serialises the calls.

    A layer runs in one piece (`demand`), or in parts: `start` some layers earlier, then `settle`,
    `run` and `correct`. Numbers lead from one part to the next; an engine may keep its steps by
    layer and give numbers that mean nothing. Tensors are on `device`; `layer` is an ordinal.
    """

    @property
    def device(self) -> torch.device:
        """Where experts are computed."""

    @property
    def default_vectors(self) -> DefaultVectors:
        """Mean outputs of the experts, learned while running."""

    @property
    def predictions(self) -> Predictions:
        """Trained networks and past choices, for predictors that are no router."""

    @property
    def fetches(self) -> bool:
        """Whether experts may be missing where they are computed."""

    @property
    def resident_layers(self) -> frozenset[int]:
        """Layers of which no expert is ever missing, where others' may be."""

    @property
    def foreign_ids(self) -> Mapping[int, int]:
        """Those of them that `run_own` takes: a rank's, with the id of other ranks' experts."""

    @property
    def prefetch_pays(self) -> bool:
        """Whether `prefetch="auto"` is to predict; asked before `configure`."""

    @property
    def plans_steps(self) -> bool:
        """Whether a graph may branch on `plan`."""

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies a few tokens with any weight.

        On a CPU its threads do (op `specmoe::products`), on a GPU a kernel.
        """

    @property
    def survives_fork(self) -> bool:
        """Whether a forked process can go on with it."""

    @property
    def direct_steps(self) -> DirectSteps | None:
        """Takes steps without the session; None where every step comes by it."""

    def configure(self, speculation: SessionOptions) -> None:
        """Take the options from now on.

        Raises:
            ValueError, SpecMoEError: the engine cannot do what one of them asks for.
        """

    def demand(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run a layer, fetching what is missing: [T, H], [T, K], [T, K] -> [T, H]."""

    def run_own(
        self, layer: int, x: Tensor, slots: Tensor, weights: Tensor, counted: Mapping[int, Tensor]
    ) -> Tensor:
        """Run a token of a layer of `foreign_ids`, see `Session.run_own_experts`."""

    def blend(self, layer: int, ids: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        """Blend default vectors: [T, K], [T, K] -> [T, H] in the dtype of `like`."""

    def predict(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Predict a layer without its router: [T, H] -> ids and weights, [T, P]."""

    def start(self, layer: int, ids: Tensor, weights: Tensor) -> int:
        """Take a prediction, [T, P], and start fetching; returns the ticket's number."""

    def plan(self, layers: Sequence[int], edges: Sequence[int], ids: Tensor) -> list[bool]:
        """Decide which of `layers` speculate in the step that begins, see `Session.plan_step`."""

    def settle(self, ticket: int, layer: int, ids: Tensor) -> int:
        """Meet a prediction with the true ids, [T, K]; returns the step's number."""

    def run(self, number: int, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run what is there: [T, H], [T, K], [T, K] -> [T, K, H], unweighted."""

    def correct(
        self, number: int, layer: int, partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Run the rest of `partial` and sum over K: [T, K, H] -> [T, H]."""

    def stats(self) -> Stats:
        """Counters so far, as a copy."""

    def reset_stats(self) -> None:
        """Set the counters to zero."""

    def interrupt(self) -> None:
        """Let a call that waits for a transfer fail, if it can; called from any thread."""

    def close(self) -> None:
        """Give back threads, memory and locks; called once, and nothing after it."""


def with_prefetch_decided(options: CompileOptions, engines: Sequence[Engine]) -> CompileOptions:
    """Resolve `prefetch="auto"`: yes, unless all engines of a graph that fetches are against it.

    Whoever gives an option that is about predictions gets them.
    """
    if options.prefetch != "auto":
        return options
    pays = (
        options.asks_for_predictions
        or not all(engine.fetches for engine in engines)  # nothing is predicted anyway
        or any(engine.prefetch_pays for engine in engines)
    )
    return replace(options, prefetch=pays)
