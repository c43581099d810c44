"""Default vectors that are learned on the device, without the host reading a value.

Shape letters: T tokens, E experts, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.kernels.blend_default_vectors.op import blend_default_vectors
from specmoe_compile.predict.default_vectors import DECODE_SAMPLES, DefaultVectors


class DeviceVectors(DefaultVectors):
    """`DefaultVectors` on the session's device: every sample of prefill, and of early decoding.

    Decoding stops to learn a layer after DECODE_SAMPLES steps, which the host counts; the steps of
    a CUDA graph learn nothing, since a replay would go on for ever.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        hidden_sizes: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        slices: Sequence[bool] | None = None,
    ) -> None:
        """As `DefaultVectors`; the id E is other ranks' in layers that are `slices`, and zero."""
        slices = slices or [False] * len(num_experts)
        rows = [experts + own for experts, own in zip(num_experts, slices, strict=True)]
        super().__init__(rows, hidden_sizes, device=device)
        self._num_experts = num_experts
        self._steps_left = [DECODE_SAMPLES] * len(num_experts)

    def blend(self, layer: int, ids: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        return blend_default_vectors(
            ids.contiguous(), weights.contiguous(), self.tables[layer], dtype=like.dtype
        )

    def learn(self, layer: int, ids: Tensor, y: Tensor) -> None:
        """Count outputs in, [T, K] and [T, K, H]."""
        self._add(layer, ids, y, ids < self._num_experts[layer])

    def learn_from_decode(self, layer: int, ids: Tensor, y: Tensor, present: Tensor) -> None:
        """Count the outputs in whose `present`, [T, K], is not negative."""
        if self._steps_left[layer]:
            self._steps_left[layer] -= 1
            self._add(layer, ids, y, present >= 0)

    def _add(self, layer: int, ids: Tensor, y: Tensor, valid: Tensor) -> None:
        if self.frozen:
            return
        table, counts = self.tables[layer], self.counts[layer]
        flat, used = ids.reshape(-1).long(), valid.reshape(-1)
        rows = torch.where(used.unsqueeze(1), y.reshape(-1, y.shape[-1]).float(), 0.0)
        new = torch.zeros_like(counts).index_add_(0, flat, used.to(counts.dtype))
        sums = torch.zeros_like(table).index_add_(0, flat, rows)
        counts += new
        # mean += (sum of the new samples - their number * mean) / samples so far
        table += (sums - new.unsqueeze(1) * table) / counts.clamp(min=1).unsqueeze(1)
