"""Prefill: whole layers pass through two device buffers, copied by the copy engine.

While a layer computes from one buffer, the next layer is copied into the other one. Decode's slots
and tables are left alone.

Shape letters: T tokens, E experts, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.expert_form import ExpertBank, ExpertForm
from specmoe_compile.kernels.grouped_experts.op import run_grouped_experts_
from specmoe_compile.runtime.cuda.streams import Streams
from specmoe_compile.runtime.layout import ExpertLayout


class PrefillBuffers:
    """Two buffers of one layer each.

    Attributes:
        total_bytes: their size.
    """

    def __init__(
        self,
        records: Sequence[Tensor],
        layouts: Sequence[ExpertLayout],
        forms: Sequence[ExpertForm],
        streams: Streams,
        device: torch.device,
    ) -> None:
        """Reserve device memory.

        Args:
            records: of each layer in host memory, [E, record_bytes] uint8; page-locked on CUDA.
            layouts, forms: of each layer.
            streams: the session's.
            device: where experts are computed.
        """
        self._records = records
        self._forms = forms
        self._streams = streams
        largest = max(bank.numel() for bank in records)
        self._buffers = torch.empty(2, largest, dtype=torch.uint8, device=device)
        self._targets = [
            self._buffers[layer % 2, : bank.numel()].view(bank.shape)
            for layer, bank in enumerate(records)
        ]
        self._banks = [
            ExpertBank.from_views(layout.bank_views(target))
            for layout, target in zip(layouts, self._targets, strict=True)
        ]
        self.total_bytes = self._buffers.numel()
        # The layer that is copied ahead, its event, and whether a capture holds that copy.
        self._ahead: tuple[int, Any, bool] | None = None

    def run(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """Unweighted outputs of all choices, [T, H], [T, K] -> [T, K, H]."""
        capturing = self._streams.capturing
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead[0], ahead[2]) == (layer, capturing):
            ready = ahead[1]
        else:
            ready = self._copy(layer)
        if layer + 1 < len(self._records):
            # Issued before this layer computes: the other buffer's last reader came before.
            self._ahead = (layer + 1, self._copy(layer + 1), capturing)
        self._streams.wait("compute", ready)
        with self._streams.on("compute"):
            y = x.new_empty((*ids.shape, x.shape[-1]))
            return run_grouped_experts_(y, x, ids, self._banks[layer], self._forms[layer])

    def _copy(self, layer: int) -> Any:
        """Copy a layer into its buffer after all work issued on compute; returns the event."""
        self._streams.wait("demand", self._streams.record("compute"))
        with self._streams.on("demand"):
            self._targets[layer].copy_(self._records[layer], non_blocking=True)
        return self._streams.record("demand")
