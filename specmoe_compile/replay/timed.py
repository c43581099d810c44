"""What stands for records and experts in a replay: sizes that are never read, and time.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.replay.link import SimulatedLink
from specmoe_compile.replay.steps import ReplaySteps
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.cpu.residency import Step
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer
from specmoe_compile.runtime.store.base import ExpertStore

_NO_WEIGHTS = ExpertTensors(WeightPlanes(torch.empty(0)), None, WeightPlanes(torch.empty(0)), None)


class SizesOnlyStore(ExpertStore):
    """A store of which only the sizes are known."""

    kind = "disk"

    def read_into(self, layer: int, expert: int, record: Tensor | memoryview) -> None:
        raise NotImplementedError("a replay reads nothing")

    def close(self) -> None:
        pass


class TimedRunner(ExpertRunner):
    """An experts layer that takes its time and computes nothing."""

    def __init__(
        self, num_experts: int, compute: Callable[[], None], *, is_slice: bool = False
    ) -> None:
        self.num_experts = num_experts
        self.hidden_size = 1
        self.dtype = torch.float32
        self.native = None
        self.foreign = num_experts if is_slice else None
        self._compute = compute

    def weights(self, record: Tensor) -> ExpertTensors:
        return _NO_WEIGHTS

    def run(self, weights: ExpertTensors, x: Tensor) -> Tensor:
        self._compute()
        return x


class TimedResidency(CachedResidency):
    """Takes its time for each expert that is used for the first time since it was read."""

    def __init__(self, fetched_s: float, link: SimulatedLink, *parts: Any) -> None:
        super().__init__(*parts)
        self._fetched_s = fetched_s
        self._link = link

    def begin(self, layer: int, experts: Sequence[int], *, prompt: Tensor | None = None) -> Step:
        stats, size_bytes = self._stats[layer], self._record_bytes[layer]
        before = stats.useful_speculative_bytes // size_bytes - stats.late_prefetches
        step = super().begin(layer, experts, prompt=prompt)
        # Prefetched and already there; the others are counted as they arrive.
        fresh = stats.useful_speculative_bytes // size_bytes - stats.late_prefetches - before
        self._link.advance(fresh * self._fetched_s)
        return step

    def next_or_none(self, step: Step, *, block: bool) -> tuple[int, ExpertTensors] | None:
        arrival = super().next_or_none(step, block=block)
        if arrival is not None:
            self._link.advance(self._fetched_s)
        return arrival


def allocate_nothing(size_bytes: int) -> Tensor:
    """Return memory that has a size and no content, [size_bytes] uint8."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="meta")


def sizes_only_store(steps: ReplaySteps) -> SizesOnlyStore:
    """Return a store with the sizes of a trace's experts."""
    trace = steps.trace
    layers = [
        StoreLayer(
            name=f"layer {index}",
            num_experts=experts,
            layout=ExpertLayout(tensors=(), record_bytes=size),
        )
        for index, (experts, size) in enumerate(
            zip(trace.num_experts, trace.record_bytes, strict=True)
        )
    ]
    return SizesOnlyStore(layers, fingerprint=trace.fingerprint, top_k=trace.top_k)
