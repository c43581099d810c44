"""What the parts of a device session share: slots, layouts, and how each layer's experts are run.

Shape letters: E experts, S slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.kernels.packed_experts.config import reason_against
from specmoe_compile.runtime.cuda.streams import Streams
from specmoe_compile.runtime.cuda.tables import DeviceCache
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm, recognise_form
from specmoe_compile.runtime.experts.formats.expert_format import DOWN_NAME, UP_NAMES
from specmoe_compile.runtime.experts.layout import ExpertLayout
from specmoe_compile.runtime.experts.module import ExpertsLayer

Norm = Callable[[Tensor], Tensor]


class DecoderParts(NamedTuple):
    """What a decoder works with; sequences hold one entry per layer.

    Attributes:
        cache: slots and tables.
        layouts: of records.
        num_experts: E.
        forms: how experts are computed.
        norms: applied to each expert's output, or None.
        streams: the session's.
        foreign: the id that stands for experts of other ranks; None where there are none.
    """

    cache: DeviceCache
    layouts: Sequence[ExpertLayout]
    num_experts: Sequence[int]
    forms: Sequence[ExpertForm]
    norms: Sequence[Norm | None]
    streams: Streams
    foreign: Sequence[int | None]

    @classmethod
    def for_layers(
        cls,
        layers: Sequence[ExpertsLayer],
        slots: Sequence[int],
        streams: Streams,
        device: torch.device,
        *,
        spare: int = 0,
    ) -> DecoderParts:
        """Reserve S slots of each layer, and spare places for all of them, on a device.

        Raises:
            UnsupportedModelError: the kernels cannot compute these experts.
        """
        for layer in layers:
            _refuse_odd_codes(layer)
        forms = [recognise_form(layer.module).with_format(layer.layout.format) for layer in layers]
        layouts = [layer.layout for layer in layers]
        num_experts = [layer.num_experts for layer in layers]
        return cls(
            cache=DeviceCache(layouts, num_experts, slots, device, spare=spare),
            layouts=layouts,
            num_experts=num_experts,
            forms=forms,
            norms=[_norm_or_none(layer) for layer in layers],
            streams=streams,
            foreign=[layer.num_experts if layer.is_slice else None for layer in layers],
        )

    @property
    def resident(self) -> frozenset[int]:
        """Layers that have a slot for every expert."""
        pairs = zip(self.cache.slots, self.num_experts, strict=True)
        return frozenset(n for n, (slots, experts) in enumerate(pairs) if slots >= experts)

    def expert_banks(self) -> list[ExpertBank]:
        """Views of each layer's slots, and spare places, as kernels take them."""
        return [
            ExpertBank.from_views(layout.bank_views(places))
            for layout, places in zip(self.layouts, self.cache.places, strict=True)
        ]

    @property
    def hidden_sizes(self) -> list[int]:
        """H of each layer."""
        pairs = zip(self.layouts, self.forms, strict=True)
        return [_hidden_size(layout, form) for layout, form in pairs]


def _refuse_odd_codes(layer: ExpertsLayer) -> None:
    """Raise `UnsupportedModelError` for coded weights that the kernels cannot read."""
    for spec in layer.layout.tensors:
        if spec.name not in (*UP_NAMES, DOWN_NAME):
            continue
        code = layer.layout.format.code(spec.name)
        if code.is_plain:
            continue
        inputs = spec.shape[1] * (2 if code.functions.bits == 4 else 1)
        reason = reason_against(code, inputs)
        if reason is not None:
            raise UnsupportedModelError(
                f"The kernels for a GPU cannot read {spec.name} of {layer.name}"
                f" ({layer.layout.format.name}): {reason}. It runs with device='cpu'."
            )


def _norm_or_none(layer: ExpertsLayer) -> Norm | None:
    owner: Any = layer.module
    return owner.post_expert_norm if getattr(owner, "has_post_expert_norm", False) else None


def _hidden_size(layout: ExpertLayout, form: ExpertForm) -> int:
    (shape,) = (spec.shape for spec in layout.tensors if spec.name == "down_proj")
    return shape[-1] if form.transposed else shape[0]
