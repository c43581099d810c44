"""Tiny real models and checkpoints that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LogitsProcessor, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from specmoe_compile.hf import prompts as prompts_module
from specmoe_compile.options import CompileOptions

VOCABULARY = 96
PATIENCE_S = 600.0
"""How long tests wait for what must happen: never so long, but a busy machine may stand still."""


def tiny_qwen3_moe(*, layers: int = 3, experts: int = 8, top_k: int = 2, **kwargs: Any) -> Any:
    """A random Qwen3-MoE whose greedy decoding does not collapse to one token."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=kwargs.pop("vocab_size", VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=kwargs.pop("moe_intermediate_size", 32),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=kwargs.pop("eos_token_id", None),
        bos_token_id=1,
        **kwargs,
    )
    return Qwen3MoeForCausalLM(config).eval()


def save_tiny(folder: Path, **kwargs: Any) -> Path:
    """Write a tiny Qwen3-MoE as a hub-format checkpoint and return its folder."""
    tiny_qwen3_moe(**kwargs).save_pretrained(folder)
    return folder


def prompts(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], int64, none of them the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def greedy(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **kwargs: Any) -> Any:
    """Greedy continuation of `ids`, prompt included: [batch, length + new_tokens]."""
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **kwargs)


@contextmanager
def prompts_left_to_the_model() -> Iterator[None]:
    """Let prompts run as the model is with `lowering="eager"`, too, as they do with Inductor.

    For tests of the steps after a prompt: there is one graph less to compile.
    """
    with mock.patch.object(prompts_module, "_runs_as_traced", _learns_no_vectors):
        yield


def _learns_no_vectors(options: CompileOptions) -> bool:
    return options.default_vectors is None


class At(LogitsProcessor):
    """Does something between two steps: before the token with this number is chosen."""

    def __init__(self, number: int, act: Callable[[], Any]) -> None:
        self._act, self._left = act, number

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._act()
        return scores
