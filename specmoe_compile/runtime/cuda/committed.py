"""Policy `commit` on a device: predictions until their steps, without the host reading a value.

Shape letters: T tokens, K top-k, P predicted per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cuda.streams import Streams
from specmoe_compile.runtime.policy.misses import Choices, MissPolicy


class Commitments:
    """Predictions of the live step, by layer, and the routing that they make of the true one."""

    def __init__(self, num_experts: Sequence[int], streams: Streams, device: torch.device) -> None:
        """Start without predictions for layers of E experts, and count on the device."""
        layers = len(num_experts)
        self._num_experts = num_experts
        self._left_out = torch.zeros(layers, dtype=torch.int64, device=device)
        self._streams = streams
        self._misses = MissPolicy(SessionOptions())
        self._predicted: list[Choices | None] = [None] * layers

    def use(self, misses: MissPolicy) -> None:
        """Take a policy from now on."""
        self._misses = misses
        self._predicted = [None] * len(self._predicted)

    def keep(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """Commit to a prediction, ids and weights [T, P]; by another policy, do nothing.

        They are copied: a compiled graph may use their memory again.
        """
        if self._misses.commits and ids.numel():
            with self._streams.on("compute"):
                self._predicted[layer] = Choices(ids.clone(), weights.clone())

    def drop(self, layer: int) -> None:
        """Let the next step of a layer be exact."""
        self._predicted[layer] = None

    def has(self, layer: int, ids: Tensor) -> bool:
        """Whether a step of this true routing, [T, K], runs what was predicted."""
        predicted = self._predicted[layer]
        return predicted is not None and len(predicted.ids) == len(ids)

    def take(self, layer: int, true: Choices) -> Choices:
        """Return what to run instead of the true choices; drops the prediction."""
        if not self.has(layer, true.ids):
            self.drop(layer)
            return true
        predicted, self._predicted[layer] = self._predicted[layer], None
        assert predicted is not None, "has() says so"
        with self._streams.on("compute"):
            ids, weights = self._misses.committed(predicted, true)
            runs = (true.ids.unsqueeze(2) == ids.unsqueeze(1)).any(dim=2)
            own = true.ids < self._num_experts[layer]
            self._left_out[layer] += (own & ~runs).sum()
            return Choices(ids.contiguous(), weights.contiguous())

    def add_to(self, layers: Sequence[LayerStats]) -> None:
        """Count the experts that were left out among a session's; waits for the device."""
        for stats, left_out in zip(layers, self._left_out.tolist(), strict=True):
            stats.skipped_experts += left_out

    def reset_stats(self) -> None:
        """Set the counters to zero."""
        self._left_out.zero_()
