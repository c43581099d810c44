"""Prefill: whole layers pass through two device buffers, copied by the copy engine.

While a layer computes from one buffer, the next layer is copied into the other one. Decode's slots
are left alone. Layers whose experts all have slots need none of this.

Shape letters: T tokens, E experts, K top-k, H hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.grouped_experts.op import run_grouped_experts_
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.cuda.streams import Streams
from specmoe_compile.runtime.cuda.supply import Supply
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm


class PrefillBuffers:
    """Two buffers of one layer each.

    Attributes:
        total_bytes: their size.
        layers: those that pass through them, in order.
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
        self.layers = [n for n in range(len(layouts)) if n not in parts.resident]
        self._next = dict(itertools.pairwise(self.layers))
        shapes = [(e, one.record_bytes) for e, one in zip(num_experts, layouts, strict=True)]
        largest = max((math.prod(shapes[layer]) for layer in self.layers), default=0)
        self._buffers = torch.empty(2, largest, dtype=torch.uint8, device=device)
        self._targets = {
            layer: self._buffers[place % 2, : math.prod(shapes[layer])].view(shapes[layer])
            for place, layer in enumerate(self.layers)
        }
        self._banks = {
            layer: ExpertBank.from_views(layouts[layer].bank_views(target))
            for layer, target in self._targets.items()
        }
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
            self._copy_ahead(layer, capturing)
        self._streams.wait("compute", ready)
        with self._streams.on("compute"):
            y = run_prompt(x, ids, self._banks[layer], self._forms[layer], self._foreign[layer])
        if self._supply is not None:
            # The host waits for these records: not before it has given the device work.
            self._copy_ahead(layer, capturing)
        return y

    def _copy_ahead(self, layer: int, capturing: bool) -> None:
        """Copy the layer behind this one."""
        following = self._next.get(layer)
        if following is not None:
            self._ahead = (following, self._copy(following), capturing)

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
            read_layer(layer, self._targets[layer], self._supply, self._streams)
        return self._streams.record("demand")


def run_prompt(
    x: Tensor, ids: Tensor, bank: ExpertBank, form: ExpertForm, foreign: int | None
) -> Tensor:
    """Unweighted outputs of all choices from a bank with every expert, expert e in slot e.

    Args:
        x: [T, H]; ids: [T, K].
        foreign: the id of other ranks' experts, whose outputs are zero; None where there are none.

    Returns:
        [T, K, H].
    """
    if foreign is None:
        y = x.new_empty((*ids.shape, x.shape[-1]))
    else:
        y = x.new_zeros((*ids.shape, x.shape[-1]))
        ids = torch.where(ids == foreign, -1, ids)
    return run_grouped_experts_(y, x, ids, bank, form)


def read_layer(layer: int, target: Tensor, supply: Supply, streams: Streams) -> None:
    """Copy a layer record by record on `demand`, as the host gets them; waits on the host.

    Args:
        layer: MoE layer ordinal.
        target: [E, record_bytes] uint8 on the device.
        supply: gives the records.
        streams: the session's.

    Raises:
        TransferError: a record could not be read.
    """
    requests = [supply.request(layer, expert) for expert in range(len(target))]
    try:
        for place, request in zip(target, requests, strict=True):
            while (record := request.record_or_none()) is None:
                supply.block()
            with streams.on("demand"):
                place.copy_(record, non_blocking=True)
            request.copied(streams.record("demand"))
    except BaseException:
        for request in requests:
            request.abandon()
        raise
