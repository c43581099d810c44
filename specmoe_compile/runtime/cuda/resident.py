"""Layers that have a slot for every expert: filled once, and then nothing is planned or fetched.

Expert e is in slot e, so that a routing says by itself where its experts are. A step of one token
takes the two launches of the experts and no other; a step of several tokens also looks its choices
up, to count each expert once. So does a step of a rank that has a part of the experts, to find
those of other ranks, unless the graph has marked them (`run_own`, pass `mask_foreign_experts`).

Shape letters: T tokens, E experts, K top-k, H hidden, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.op import run_experts_decode, run_resident_experts
from specmoe_compile.kernels.grouped_experts.op import reduce_choices
from specmoe_compile.kernels.plan_cache.op import COUNTERS, plan_cache
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cuda.decoder import DecodeStep
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.cuda.prefill import read_layer, run_prompt
from specmoe_compile.runtime.cuda.stats import layer_stats
from specmoe_compile.runtime.cuda.supply import Supply
from specmoe_compile.system.progress import phase
from specmoe_compile.system.sizes import format_bytes

FOLLOWED = "none, all experts are there"
"""What decides who leaves such a layer's slots, in words."""


class ResidentLayers:
    """Those layers of a session, and how often their steps ran.

    Attributes:
        layers: their ordinals.
        foreign_ids: of those that have a part of the experts, the id that stands for the others.
    """

    def __init__(self, parts: DecoderParts, *, top_k: int) -> None:
        """Find the layers; their slots are still to be filled.

        Args:
            parts: see `Decoder`.
            top_k: K of a token, by which steps of one token are counted.
        """
        self.layers = parts.resident
        self.foreign_ids = {
            layer: foreign
            for layer, foreign in enumerate(parts.foreign)
            if foreign is not None and layer in self.layers
        }
        self._parts = parts
        self._streams = parts.streams
        self._banks = parts.expert_banks()
        self._top_k = top_k
        self._last = max(self.layers, default=-1)
        self._filled_bytes = [0] * len(parts.layouts)
        self._ready: dict[int, Any] = {}
        # Layers that ran and are not counted yet, while a graph is captured (True) and else.
        self._uncounted: dict[bool, set[int]] = {False: set(), True: set()}
        device = parts.cache.counters.device
        self._own = torch.tensor(sorted(self.foreign_ids), dtype=torch.int64, device=device)
        self._own_step = torch.zeros_like(parts.cache.counters)
        self._own_step[self._own, COUNTERS.index("steps")] = 1
        self._one_step = torch.zeros_like(parts.cache.counters)
        for layer in self.layers:
            self._one_step[layer, COUNTERS.index("steps")] = 1
            self._one_step[layer, COUNTERS.index("hits")] = top_k

    def fill(self, records: Sequence[Tensor], supply: Supply | None) -> None:
        """Copy every expert into its slot, once; from RAM without waiting for the copies.

        Args:
            records: of each layer in host memory, [E, record_bytes] uint8; page-locked on CUDA.
            supply: where records come from instead: the host waits for each.

        Raises:
            TransferError: a record could not be read.
        """
        if not self.layers:
            return
        banks = self._parts.cache.banks
        size_bytes = sum(banks[layer].numel() for layer in self.layers)
        self._streams.wait("demand", self._streams.record("compute"))  # slots were made there
        with phase(f"copying {format_bytes(size_bytes)} of experts to the GPU"):
            for layer in sorted(self.layers):
                if supply is None:
                    with self._streams.on("demand"):
                        banks[layer].copy_(records[layer], non_blocking=True)
                else:
                    read_layer(layer, banks[layer], supply, self._streams)
                self._ready[layer] = self._streams.record("demand")
                self._filled_bytes[layer] = banks[layer].numel()

    def step(self, layer: int, ids: Tensor) -> DecodeStep:
        """A step of a routing, [T, K], all of whose experts are there, for a layer that is split.

        -1 and E are nobody.
        """
        slots = self._slots(layer, ids)
        with self._streams.on("compute"):
            return DecodeStep(slots, torch.full_like(slots, -1), None)

    def run(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the experts of a few tokens: [T, H], [T, K], [T, K] -> [T, H]."""
        return self._compute(layer, x, self._slots(layer, ids), weights)

    def run_own(
        self, layer: int, x: Tensor, slots: Tensor, weights: Tensor, counted: Mapping[int, Tensor]
    ) -> Tensor:
        """As `run`, of one token, with the slots, -1 for experts of other ranks.

        Args:
            counted: by layer the slots, [1, K], whose uses are to be counted now.
        """
        self._streams.wait("compute", self._ready[layer])
        out = self._compute(layer, x, slots, weights)
        if counted:
            self._count_own(counted)
        return out

    def _compute(self, layer: int, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        bank, form, norm = self._banks[layer], self._parts.forms[layer], self._parts.norms[layer]
        with self._streams.on("compute"):
            if norm is None:
                return run_experts_decode(x, slots, weights, bank, form)
            y = norm(run_resident_experts(x, slots, weights, bank, form))
            return reduce_choices(y.contiguous(), weights)

    def run_prompt(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """Unweighted outputs of many tokens, from the slots; as `PrefillBuffers.run`."""
        self._streams.wait("compute", self._ready[layer])
        with self._streams.on("compute"):
            return run_prompt(
                x, ids, self._banks[layer], self._parts.forms[layer], self._parts.foreign[layer]
            )

    def add_to(self, layers: Sequence[LayerStats], *, counters: bool) -> None:
        """Add what filling the slots copied to a session's counters.

        Args:
            layers: of the session.
            counters: add what the device counted, too; waits for it.
        """
        if counters:
            record_bytes = [layout.record_bytes for layout in self._parts.layouts]
            for stats, counted in zip(
                layers, layer_stats(self._parts.cache, record_bytes), strict=True
            ):
                stats.add(counted)
        for stats, filled_bytes in zip(layers, self._filled_bytes, strict=True):
            stats.filled_bytes += filled_bytes

    def count(self) -> None:
        """Write down on the device which layers ran since the last time."""
        self._count(capturing=False)

    def reset_stats(self) -> None:
        """Set the counters to zero."""
        self._uncounted[False].clear()
        self._parts.cache.reset_counters()
        self._filled_bytes = [0] * len(self._filled_bytes)

    def _slots(self, layer: int, ids: Tensor) -> Tensor:
        """Slot of each choice, [T, K], -1 for nobody; counts the step."""
        # A capture begins when the device is idle, and holds no wait for what came before.
        self._streams.wait("compute", self._ready[layer])
        if ids.shape == (1, self._top_k) and self._parts.foreign[layer] is None:
            self._ran(layer)
            return ids
        with self._streams.on("compute"):
            # Nothing is missing and nothing leaves: of the policies this one costs least.
            return plan_cache(ids, self._parts.cache.tables[layer], policy="lru").present

    def _count_own(self, counted: Mapping[int, Tensor]) -> None:
        """Count a step of each of these layers, in a few launches if they are all of their kind."""
        steps, hits = (COUNTERS.index(name) for name in ("steps", "hits"))
        counters, layers = self._parts.cache.counters, sorted(counted)
        with self._streams.on("compute"):
            used = (torch.cat([counted[layer] for layer in layers]) >= 0).sum(dim=1)
            if len(layers) == len(self.foreign_ids):
                counters += self._own_step
                counters[:, hits].index_add_(0, self._own, used)
                return
            for layer, more in zip(layers, used, strict=True):
                counters[layer, steps] += 1
                counters[layer, hits] += more

    def _ran(self, layer: int) -> None:
        """Count a step of one token; one launch counts all layers, behind the last of them."""
        capturing = self._streams.capturing
        if layer in self._uncounted[False] and not capturing:
            self._count(capturing=False)  # another step began
        self._uncounted[capturing].add(layer)
        if layer == self._last:
            self._count(capturing=capturing)

    def _count(self, *, capturing: bool) -> None:
        uncounted, self._uncounted[capturing] = self._uncounted[capturing], set()
        counters = self._parts.cache.counters
        with self._streams.on("compute"):
            if uncounted == self.layers:
                counters += self._one_step
                return
            for layer in uncounted:
                counters[layer] += self._one_step[layer]
