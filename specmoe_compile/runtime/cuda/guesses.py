"""Predicted experts whose copies have not been started, on their way to the host.

Shape letters: T tokens, E experts, P predicted per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specmoe_compile.runtime.cuda.streams import Streams


@dataclass(slots=True, eq=False)
class Guess:
    """A prediction of which some experts may not be on their way yet.

    Attributes:
        layer: MoE layer ordinal.
        max_records: that may still be copied for it.
        values: [T, P] on the host, valid once `event` is reached.
        experts: left to be copied, most probable first; None until they are known.
    """

    layer: int
    max_records: int
    values: Tensor
    event: Any
    experts: deque[int] | None = None


class Guesses:
    """Predictions in the order in which they were made; the host never waits for them."""

    def __init__(self, streams: Streams, num_experts: Sequence[int]) -> None:
        """Start without any; `num_experts` is E of each layer."""
        self._streams = streams
        self._num_experts = num_experts
        self._guesses: deque[Guess] = deque()

    def __bool__(self) -> bool:
        """Whether experts may be left to be copied."""
        return bool(self._guesses)

    def add(self, layer: int, ids: Tensor, max_records: int) -> None:
        """Start copying predicted ids, [T, P], to the host."""
        values = self._streams.to_host(ids)
        self._guesses.append(Guess(layer, max_records, values, self._streams.record("compute")))

    def next_or_none(self) -> tuple[Guess, int] | None:
        """Take the next expert and its guess; None where the host has none."""
        while self._guesses:
            guess = self._guesses[0]
            experts = self._known_or_none(guess)
            if experts is None:
                return None
            if experts and guess.max_records > 0:
                return guess, experts.popleft()
            self._guesses.popleft()
        return None

    def drop(self, layer: int) -> list[int]:
        """Drop a layer's guesses; returns the experts that were left, as far as they are known."""
        dropped = [guess for guess in self._guesses if guess.layer == layer]
        self._guesses = deque(guess for guess in self._guesses if guess.layer != layer)
        return [expert for guess in dropped for expert in self._known_or_none(guess) or ()]

    def _known_or_none(self, guess: Guess) -> deque[int] | None:
        """Experts of a guess that are left to be copied; None until the host has them."""
        if guess.experts is None and self._streams.reached(guess.event):
            # The first choices of all tokens come first.
            ranked = guess.values.t().reshape(-1).tolist()
            experts = self._num_experts[guess.layer]
            guess.experts = deque(e for e in dict.fromkeys(ranked) if 0 <= e < experts)
        return guess.experts
