"""What both ways of decoding share: computing from slots, and what a step carries.

Shape letters: T tokens, E experts, K top-k, P predicted per token, H hidden, S slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specmoe_compile.kernels.correct_experts.op import correct_experts
from specmoe_compile.kernels.expert_mlp.op import run_resident_experts
from specmoe_compile.kernels.grouped_experts.op import reduce_choices
from specmoe_compile.kernels.plan_cache.op import MAX_CHOICES
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cuda.parts import DecoderParts


class DecodeStep(NamedTuple):
    """One layer step between its demand plan and its correction.

    Attributes:
        present: [T, K] int32, slot of each choice whose record is there, else -1.
        late: [T, K] int32, slot or spare place of each choice that is on its way, else -1.
        skipped: [T, K] int32, experts that a default vector stands in for, else -1; or None.
        arrivals: the transfers that `late` needs, where the decoder tells them apart.
        weights: [T, K] to sum with; None for the router's.
    """

    present: Tensor
    late: Tensor
    skipped: Tensor | None
    arrivals: tuple[Any, ...] = ()
    weights: Tensor | None = None


class Decoder(ABC):
    """Plans, fetches, runs and corrects the layers of decode steps."""

    def __init__(self, parts: DecoderParts) -> None:
        """Tie the parts together; none is owned."""
        self._cache = parts.cache
        self._num_experts = parts.num_experts
        self._forms = parts.forms
        self._norms = parts.norms
        self._streams = parts.streams
        self._record_bytes = [layout.record_bytes for layout in parts.layouts]
        self._banks = parts.expert_banks()
        # The layer whose step may have experts in the spare places: until its correction.
        self._spare_owner: int | None = None

    def fits(self, layer: int, choices: int) -> bool:
        """Whether the experts of so many choices always have slots; from shapes alone."""
        needed = min(choices, self._num_experts[layer])
        return 0 < choices <= MAX_CHOICES and needed <= self._cache.slots[layer]

    @abstractmethod
    def prefetch(self, layer: int, ids: Tensor, max_records: int = MAX_CHOICES) -> None:
        """Start fetching predicted experts; never waits on the host.

        Args:
            layer: MoE layer ordinal.
            ids: [T, P], most probable first; -1 and E are nobody here.
            max_records: records to fetch at most.
        """

    @abstractmethod
    def demand(
        self, layer: int, ids: Tensor, weights: Tensor | None = None, threshold: float = 0.0
    ) -> DecodeStep:
        """Start fetching the experts of a routing, [T, K]; -1 and E are nobody here.

        Args:
            layer: MoE layer ordinal.
            ids: [T, K] int64 or int32, contiguous.
            weights: [T, K]; if given, absent experts whose weight is below the threshold for each
                of their tokens are left out.
            threshold: router weight.
        """

    @abstractmethod
    def note_prompt(self, layer: int, ids: Tensor) -> None:
        """Let a prefill's routing say what is worth keeping, see `ExpertCache.note_prompt`.

        Never waits on the host, and touches no slot.

        Args:
            layer: MoE layer ordinal.
            ids: [T, K] int64 or int32, contiguous; -1 and E are nobody here.
        """

    @abstractmethod
    def wait(self, layer: int, step: DecodeStep) -> None:
        """Make compute wait for what `step.late` needs."""

    @abstractmethod
    def join(self, layer: int) -> None:
        """Make compute wait for what is in flight into a layer's slots."""

    @abstractmethod
    def stats(self) -> tuple[LayerStats, ...]:
        """Counters of each layer so far, as copies; may wait for the device."""

    @abstractmethod
    def followed(self) -> tuple[str, ...]:
        """What decides who leaves each layer's slots, in words; may wait for the device."""

    @abstractmethod
    def reset_stats(self) -> None:
        """Set the counters to zero."""

    @abstractmethod
    def forget(self) -> None:
        """Let compute wait for all that is in flight, and drop what the slots hold."""

    @abstractmethod
    def _slots_were_read(self, layer: int) -> None:
        """Take note that work which reads a layer's slots was issued on compute."""

    def normed(self, layer: int, y: Tensor) -> Tensor:
        """Experts' outputs, [..., H], as the model weighs them: past a norm of their own."""
        norm = self._norms[layer]
        if norm is None:
            return y
        with self._streams.on("compute"):
            return norm(y)

    def run(self, layer: int, step: DecodeStep, x: Tensor, weights: Tensor) -> Tensor:
        """Unweighted outputs of the experts that are there, before a norm, [T, K, H]."""
        with self._streams.on("compute"):
            y = run_resident_experts(
                x, step.present, weights, self._banks[layer], self._forms[layer]
            )
        self._slots_were_read(layer)
        return y

    def correct(
        self,
        layer: int,
        step: DecodeStep,
        partial: Tensor,
        x: Tensor,
        weights: Tensor,
        vectors: Tensor,
    ) -> Tensor:
        """Run the late experts and sum over K: [T, K, H] -> [T, H].

        Args:
            layer: MoE layer ordinal.
            step: from `demand`.
            partial: from `run`.
            x: [T, H].
            weights: [T, K].
            vectors: default vectors, [E, H] float32.
        """
        self.wait(layer, step)
        if self._norms[layer] is not None:
            out = self._correct_normed(layer, step, partial, x, weights, vectors)
        else:
            with self._streams.on("compute"):
                out = correct_experts(
                    partial,
                    x,
                    step.late,
                    weights,
                    self._banks[layer],
                    self._forms[layer],
                    skipped=step.skipped,
                    default_vectors=None if step.skipped is None else vectors,
                )
        self._slots_were_read(layer)
        if self._spare_owner == layer:
            self._spare_owner = None
        return out

    def _spare_places(self, layer: int) -> int:
        """How many spare places a step that is planned now may use.

        None while those of another layer's step, which has not been corrected, may be there: only
        routers that do not depend on earlier experts make steps overlap.
        """
        if self._spare_owner not in (None, layer):
            return 0
        self._spare_owner = layer
        return self._cache.spare

    def _correct_normed(
        self,
        layer: int,
        step: DecodeStep,
        partial: Tensor,
        x: Tensor,
        weights: Tensor,
        vectors: Tensor,
    ) -> Tensor:
        """`correct` with a norm between the experts and the sum; transfers are waited for."""
        bank, form = self._banks[layer], self._forms[layer]
        with self._streams.on("compute"):
            y = run_resident_experts(x, step.late, weights, bank, form, partial)
        y = self.normed(layer, y)
        with self._streams.on("compute"):
            if step.skipped is not None:
                means = vectors[step.skipped.clamp(min=0).long()].to(y.dtype)
                y = torch.where((step.skipped >= 0).unsqueeze(-1), means, y)
            return reduce_choices(y.contiguous(), weights)
