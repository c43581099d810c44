"""Tiny random checkpoints in hub format, of families that store their experts in different ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_FINE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def _vision_text(**fields: Any) -> dict[str, Any]:
    sections = {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 1e4}
    return {**_COMMON, "head_dim": 16, "rope_parameters": sections, **fields}


def _qwen3_vl_moe() -> Any:
    return transformers.Qwen3VLMoeConfig(
        text_config=_vision_text(**_FINE),
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )


def _ernie_vl() -> Any:
    return transformers.Ernie4_5_VLMoeConfig(
        text_config=_vision_text(moe_num_experts=4, moe_k=2, moe_intermediate_size=[32, 16]),
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    )


def _nemotron_h() -> Any:
    return transformers.NemotronHConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        use_mamba_kernels=False,
    )


# What is particular about how each stores its experts.
CONFIGS: dict[str, Callable[[], Any]] = {
    # one tensor per expert and projection; a dense layer between MoE layers
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, **_FINE, head_dim=16, mlp_only_layers=[1]
    ),
    # other names, renamed block
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=4),
    # packed, transposed, interleaved, biased
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    # dense layers first, shared experts
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_DEEPSEEK),
    # packed in a linear layer of another name
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_COMMON, num_local_experts=4),
    # packed; transposed only if the shape says so; a vision part
    "qwen3_vl_moe": _qwen3_vl_moe,
    # text and vision experts of a layer in one list
    "ernie4_5_vl_moe": _ernie_vl,
    # no gate
    "nemotron_h": _nemotron_h,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model of a family, every parameter different from its initial value."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for auto_class in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
    ):
        if type(config) in auto_class._model_mapping:
            model: PreTrainedModel = auto_class.from_config(config).to(dtype)
            break
    else:
        raise AssertionError(f"no model for {name}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def write(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a family's checkpoint in its hub format, in several shards; returns the folder."""
    if name == "gpt_oss_mxfp4":
        return _write_mxfp4(folder)
    if name == "deepseek_v3_fp8":
        return _write_fp8(folder)
    build(name, dtype).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def _write_mxfp4(folder: Path) -> Path:
    """GPT-OSS as it is published: experts in blocks of 4-bit floats with 8-bit exponents."""
    build("gpt_oss", torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 130, blocks, dtype=torch.uint8)
    _rewrite(folder, tensors, {"quant_method": "mxfp4"})
    return folder


def _write_fp8(folder: Path) -> Path:
    """DeepSeek-V3 as it is published: 8-bit floats with a scale per block."""
    build("deepseek_v3", torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = (tensors[name] * 20).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 16), -(-columns // 16))
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    _rewrite(folder, tensors, settings)
    return folder


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantisation}))
