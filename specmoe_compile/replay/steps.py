"""A trace cut into steps and layers, as the runtime takes them.

Shape letters: T tokens, L MoE layers, K top-k, P predicted per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.replay.trace import RoutingTrace

Rows = tuple[Tensor, Tensor]


class ReplaySteps:
    """Routings and predictions by step and layer, cut once and used by every replay.

    Attributes:
        trace: where they come from.
        tokens: T of each step.
        inputs: [T, 1] zeros of each step, in place of hidden states.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self.tokens = trace.tokens
        zeros = {count: torch.zeros(count, 1) for count in set(self.tokens)}
        self.inputs = [zeros[count] for count in self.tokens]
        short = [count if count <= MAX_DECODE_TOKENS else 0 for count in self.tokens]
        tensors = trace.tensors
        self._routed = _cut(tensors["ids"], tensors["weights"], self.tokens)
        self._predicted = _cut(tensors["predicted_ids"], tensors["predicted_weights"], short)
        self._has_prediction: list[list[int]] = tensors["predicted"].tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def routed(self, step: int, layer: int) -> Rows:
        """Return the experts that the router chose, ids [T, K] int64 and weights [T, K] float32."""
        return self._routed[step][layer]

    def predicted(self, step: int, layer: int) -> Rows | None:
        """Return what was predicted, ids [T, P] int64 and weights [T, P] float32, if anything."""
        if not self._has_prediction[step][layer] or self.tokens[step] > MAX_DECODE_TOKENS:
            return None
        return self._predicted[step][layer]

    def predicted_share(self, steps: Sequence[int]) -> float:
        """Share of the layers behind the first that were predicted in these steps."""
        layers = self.trace.layers - 1
        found = sum(sum(self._has_prediction[step][1:]) for step in steps)
        return found / max(1, layers * len(steps))

    def requests(self, layer: int, steps: Sequence[int]) -> list[list[int]]:
        """Return the distinct experts of each step, for Belady's bound."""
        rows = [self._routed[step][layer][0].reshape(-1).tolist() for step in steps]
        return [list(dict.fromkeys(row)) for row in rows]


def _cut(ids: Tensor, weights: Tensor, tokens: Sequence[int]) -> list[list[Rows]]:
    """Cut [rows, L, width] into steps and layers, without the padding."""
    layers = range(ids.shape[1])
    widths = [_width(ids[:, layer]) for layer in layers]
    out: list[list[Rows]] = []
    parts = (torch.split(tensor, list(tokens)) for tensor in (ids.long(), weights))
    for part_ids, part_weights in zip(*parts, strict=True):
        out.append(
            [
                (
                    part_ids[:, layer, : widths[layer]].contiguous(),
                    part_weights[:, layer, : widths[layer]].contiguous(),
                )
                for layer in layers
            ]
        )
    return out


def _width(ids: Tensor) -> int:
    """Experts per token of one layer, [rows, width] padded with -1."""
    return int((ids >= 0).sum(dim=1).max()) if ids.numel() else 0
