"""What a model's `forward` is given for each new token, without making masks anew every time.

`prepare_inputs_for_generation` builds positions and masks in some twenty small operations per
token. With a static cache all that changes from one step to the next is one more key that the mask
lets through, and a position that is one higher: both are written where they are.

Shape letters: B sequences, S cache length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS

_ADVANCED = {"input_ids", "position_ids", "attention_mask", *CACHE_ARGUMENTS}
_KNOWN_MASKS = {"full_attention", "sliding_attention"}


class StepInputs:
    """Makes the arguments of every decode step of one generation.

    Attributes:
        advances: whether masks and positions are written in place, from the second step on.
        repeats: whether, besides, nothing that the host counts leads to another graph: a window
            counts its tokens, and changes once, when it is full.
    """

    def __init__(self, model: Any) -> None:
        """Start before the first decode step."""
        self._model = model
        self._inputs: dict[str, Any] | None = None
        self._masks: list[Tensor] = []
        self._filled = 0

    @property
    def advances(self) -> bool:
        return self._inputs is not None

    @property
    def repeats(self) -> bool:
        return self._inputs is not None and all(
            type(layer) is StaticLayer
            or getattr(layer, "cumulative_length_int", -1) > layer.max_cache_len
            for layer in cache_of(self._inputs).layers
        )

    def make(self, tokens: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for the last of `tokens`, [B, length]; waits for the device the first time."""
        if self._inputs is not None:
            return self._advance(self._inputs, tokens[:, -1:])
        length = 1 if model_kwargs.get("use_cache", True) else None
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            tokens, next_sequence_length=length, **model_kwargs
        )
        if self._can_advance(inputs, model_kwargs):
            self._keep(inputs)
        return inputs

    def _can_advance(self, inputs: dict[str, Any], model_kwargs: dict[str, Any]) -> bool:
        """Whether the next step differs in what `_advance` changes, and in nothing else."""
        model = type(self._model)
        if (
            model.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
            or hasattr(model, "create_masks_for_generate")
        ):
            return False
        if any(isinstance(inputs[name], Tensor) for name in inputs.keys() - _ADVANCED):
            return False
        layers = getattr(cache_of(inputs), "layers", None)
        if not layers or any(
            type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in layers
        ):
            return False
        # A window moves over the padding, and would show it where it has moved away.
        given = model_kwargs.get("attention_mask")
        slides = any(layer.is_sliding for layer in layers)
        if slides and given is not None and not bool((given == 1).all()):
            return False
        masks = inputs.get("attention_mask")
        if masks is None:
            return given is None  # the model makes its masks itself
        if isinstance(masks, dict) and masks.keys() - _KNOWN_MASKS:
            return False
        if getattr(self._model.config.get_text_config(), "attention_chunk_size", None) is not None:
            return False
        masks = _masks_of(masks)
        return bool(masks) and all(
            isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == 1 for mask in masks
        )

    def _keep(self, inputs: dict[str, Any]) -> None:
        """Own what is written in place; the mask of a step that was launched is not read again."""
        self._inputs = dict(inputs)
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor):
            self._inputs["position_ids"] = positions.clone()
        self._masks = _masks_of(inputs.get("attention_mask"))
        self._filled = int(cache_of(inputs).get_seq_length())

    def _advance(self, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        self._filled += 1
        for mask in self._masks:
            # A window that is full lets all of its keys through.
            if self._filled < mask.shape[3]:
                mask.select(3, self._filled).fill_(mask.dtype == torch.bool)
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor):
            positions.add_(1)
        return {**inputs, "input_ids": tokens.clone(memory_format=torch.contiguous_format)}


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache of keys and values among a model's arguments, or None."""
    found = (arguments.get(name) for name in CACHE_ARGUMENTS)
    return next((cache for cache in found if cache is not None), None)


def _masks_of(mask: Any) -> list[Any]:
    """The masks of a model's argument: one for all layers, or one for each kind of layer."""
    return list(mask.values()) if isinstance(mask, dict) else [] if mask is None else [mask]
