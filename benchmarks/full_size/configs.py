"""Configurations of models in full shape, and of tiny ones of the same kinds."""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV2Config, GptOssConfig, Qwen3MoeConfig


def qwen3_30b() -> Any:
    """Qwen3-30B-A3B."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is declared nowhere
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=131072,
    )


def gpt_oss_20b() -> Any:
    """GPT-OSS-20B."""
    return GptOssConfig(num_hidden_layers=24, num_local_experts=32)


def deepseek_v2_lite() -> Any:
    """DeepSeek-V2-Lite, whose attention keeps latents."""
    return DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        max_position_embeddings=163840,
    )


def tiny_deepseek() -> Any:
    """Of the same kind, for the CPU."""
    return DeepseekV2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=64,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )


def tiny_qwen3() -> Any:
    """Of the same kind, for the CPU."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is declared nowhere
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=64,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )


def tiny_gpt_oss() -> Any:
    """Of the same kind, for the CPU."""
    return GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        num_local_experts=32,
        num_experts_per_tok=4,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
