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

from specmoe_compile.kernels.grouped_experts.op import run_grouped_experts_
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.cuda.supply import Supply
from specmoe_compile.runtime.experts.form import ExpertBank


class PrefillBuffers:
    """Two buffers of one layer each.

    Attributes:
        total_bytes: their size.
    """

    def __init__(
        self,
        parts: DecoderParts,
        records: Sequence[Tensor],
        device: torch.device,
        *,
        supply: Supply | None = None,
    ) -> None:
        """Reserve device memory.

        Args:
            parts: layouts, forms and streams of the session; its slots are left alone.
            records: of each layer in host memory, [E, record_bytes] uint8; page-locked on CUDA.
            device: where experts are computed.
            supply: where records come from instead of `records`.
        """
        self._records = records
        self._supply = supply
        self._forms = parts.forms
        self._streams = parts.streams
        self._foreign = parts.foreign
        layouts, num_experts = parts.layouts, parts.num_experts
        shapes = [(e, one.record_bytes) for e, one in zip(num_experts, layouts, strict=True)]
        largest = max(experts * size for experts, size in shapes)
        self._buffers = torch.empty(2, largest, dtype=torch.uint8, device=device)
        self._targets = [
            self._buffers[layer % 2, : experts * size].view(experts, size)
            for layer, (experts, size) in enumerate(shapes)
        ]
        self._banks = [
            ExpertBank.from_views(layout.bank_views(target))
            for layout, target in zip(layouts, self._targets, strict=True)
        ]
        self.total_bytes = self._buffers.numel()
        # The layer that is copied ahead, its event, and whether a capture holds that copy.
        self._ahead: tuple[int, Any, bool] | None = None

    def run(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """Unweighted outputs of all choices, [T, H], [T, K] -> [T, K, H]; zero on other ranks'."""
        capturing = self._streams.capturing
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead[0], ahead[2]) == (layer, capturing):
            ready = ahead[1]
        else:
            ready = self._copy(layer)
        if self._supply is None:
            # Issued before this layer computes: the other buffer's last reader came before.
            self._copy_ahead(layer + 1, capturing)
        self._streams.wait("compute", ready)
        with self._streams.on("compute"):
            foreign = self._foreign[layer]
            if foreign is None:
                y = x.new_empty((*ids.shape, x.shape[-1]))
            else:
                y = x.new_zeros((*ids.shape, x.shape[-1]))
                ids = torch.where(ids == foreign, -1, ids)
            y = run_grouped_experts_(y, x, ids, self._banks[layer], self._forms[layer])
        if self._supply is not None:
            # The host waits for these records: not before it has given the device work.
            self._copy_ahead(layer + 1, capturing)
        return y

    def _copy_ahead(self, layer: int, capturing: bool) -> None:
        if layer < len(self._targets):
            self._ahead = (layer, self._copy(layer), capturing)

    def scratch(self, layer: int) -> Tensor:
        """Give a layer's buffer to another use, [E, record_bytes]; what it holds is forgotten."""
        self._ahead = None
        return self._targets[layer]

    def _copy(self, layer: int) -> Any:
        """Copy a layer into its buffer after all work issued on compute; returns the event."""
        self._streams.wait("demand", self._streams.record("compute"))
        if self._supply is None:
            with self._streams.on("demand"):
                self._targets[layer].copy_(self._records[layer], non_blocking=True)
        else:
            self._read(layer, self._supply)
        return self._streams.record("demand")

    def _read(self, layer: int, supply: Supply) -> None:
        """Copy a layer record by record, as the host gets them; waits on the host."""
        target = self._targets[layer]
        requests = [supply.request(layer, expert) for expert in range(len(target))]
        try:
            for place, request in zip(target, requests, strict=True):
                while (record := request.record_or_none()) is None:
                    supply.block()
                with self._streams.on("demand"):
                    place.copy_(record, non_blocking=True)
                request.copied(self._streams.record("demand"))
        except BaseException:
            for request in requests:
                request.abandon()
            raise
