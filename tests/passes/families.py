"""Tiny random models of the families that the passes must understand.

Their experts call `specmoe::experts` and nothing else, so that a recording session can stand in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import specmoe_compile.ops  # noqa: F401

VOCABULARY, HIDDEN, EXPERTS, TOP_K = 96, 64, 8, 2
IMPLEMENTATION = "specmoe_passes_test"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "mixtral": {"num_local_experts": EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}
"""Model type -> what its configuration needs besides the common fields."""


def _forward(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = torch.ops.specmoe.experts(flat, ids, weights, 0, module._specmoe_layer)
    return out.view(x.shape)


def tiny(family: str, **kwargs: Any) -> tuple[PreTrainedModel, int]:
    """Build a tiny model; returns it with its number of MoE layers."""
    torch.manual_seed(0)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    config = CONFIG_MAPPING[family](**{**_COMMON, **FAMILIES[family], **kwargs})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module._specmoe_layer = count  # type: ignore[assignment]
            count += 1
    model.set_experts_implementation(IMPLEMENTATION)
    return model, count
