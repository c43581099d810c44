"""How many slots a GPU's memory leaves beside all else that a decoding model keeps there.

Shape letters: E experts, K top-k, L layers, C context.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.full_size.model import Shape, cached_sizes

RUNTIME_BYTES = 1 << 30
"""The driver's own, CUDA graphs, and what a step computes besides."""
PROMPT_BUFFERS = 2
"""Layers whose experts a prompt has in GPU memory at once, besides the slots."""


def plain_bytes(shape: Shape, layers: int | None = None) -> int:
    """Of a model's parameters outside its routed experts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.configured(layers), dtype=shape.dtype)
    return sum(
        value.numel() * value.element_size()
        for name, value in model.named_parameters()
        if ".experts." not in name
    )


def attended_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Of keys and values of so many tokens; sliding windows keep their length."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or tokens
    rows = sum(min(tokens, window) if kind.startswith("sliding") else tokens for kind in kinds)
    heads, key, value = cached_sizes(config)
    return rows * heads * (key + value) * itemsize


def other_bytes(
    shape: Shape, context: int, largest_layer_bytes: int, *, layers: int | None = None
) -> int:
    """GPU memory that a run takes besides the slots.

    Args:
        shape: the model.
        context: C.
        largest_layer_bytes: of one layer's experts.
        layers: L, None for the model's own.
    """
    attended = attended_bytes(shape.configured(layers), context, shape.dtype.itemsize)
    buffers = PROMPT_BUFFERS * largest_layer_bytes
    return plain_bytes(shape, layers) + attended + buffers + RUNTIME_BYTES


def slots_in_memory(free_bytes: int, slot_bytes: int, *, experts: int, top_k: int) -> int:
    """S per layer, at most E.

    Args:
        free_bytes: that are left for slots.
        slot_bytes: of one slot in each layer.
        experts, top_k: E and K.

    Raises:
        ValueError: fewer than K fit, and no token could be computed.
    """
    slots = min(experts, free_bytes // slot_bytes)
    if slots < top_k:
        raise ValueError(
            f"{max(0, free_bytes) / 1e9:.1f} GB are left for experts, room for {max(0, slots)} in"
            f" each layer, and a token takes {top_k}: more GPU memory, or a smaller format."
        )
    return slots
