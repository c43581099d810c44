"""Prompts of many lengths after each other, with one compiled model: what both devices check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import specmoe_compile
from tests.helpers import greedy, prompts

LENGTHS = (1, 2, 15, 16, 17, 100, 9)
"""Around the bound of a decode step, 16 tokens; the last one is shorter than those before it."""
NEW_TOKENS = 6


def offload(checkpoint: Path, device: str, **options: Any) -> tuple[Any, Any]:
    """The model with half of its experts in a cache, compiled for CUDA graphs that predict."""
    model = specmoe_compile.from_pretrained(
        checkpoint, device=device, store="ram", expert_cache="50%", progress=False
    )
    options = {"mode": "reduce-overhead", "prefetch": True, **options}
    return model, torch.compile(model, backend="specmoe", options=options)


def load_plain(checkpoint: Path, device: str) -> Any:
    """The unmodified model, which transformers would compile on a GPU by itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint).to(device).eval()
    model.generation_config.disable_compile = True
    return model


def check_lengths(
    compiled: Any, plain: Any, *, cache: str, batch: int, lengths: Sequence[int] = LENGTHS
) -> None:
    """Two generations of each length, tokens equal to those of the unmodified model."""
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    for length in lengths:
        for seed in (0, 1):
            ids = prompts(batch, length, seed=seed).to(plain.device)
            found = greedy(compiled, ids, NEW_TOKENS, **settings)
            expected = greedy(plain, ids, NEW_TOKENS, **settings)
            assert torch.equal(found, expected), f"{length} tokens, prompt {seed}"
