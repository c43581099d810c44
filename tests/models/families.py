"""Every model class of transformers whose experts use the experts interface, made tiny.

Nothing here lists models: the walk looks for experts classes in the modeling files, and rules on
field names shrink any configuration. What the rules cannot know is in `OVERRIDES`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.models.tiny_configs import EXPERTS, TOP_K, tiny_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One modeling file, and one of its classes that generate text.

    Attributes:
        name: folder of the modeling file.
        model_class: the class; None where no class of the file generates text.
        experts_classes: classes of the file that use the experts interface.
    """

    name: str
    model_class: type[PreTrainedModel] | None
    experts_classes: tuple[type[nn.Module], ...]

    @property
    def class_name(self) -> str:
        return "" if self.model_class is None else self.model_class.__name__


@functools.cache
def families() -> dict[str, Family]:
    """Name -> family, one per modeling file; a causal language model is preferred."""
    return {name: _family(name, classes) for name, classes in _modeling_files().items()}


@functools.cache
def family_names() -> list[str]:
    """Folders of the modeling files that have experts, read as text: importing them takes long."""
    return sorted({path.parent.name for path in _modeling_paths()})


def _modeling_paths() -> list[Path]:
    root = Path(transformers.__file__).parent / "models"
    paths = sorted(root.glob("*/modeling_*.py"))
    return [p for p in paths if "use_experts_implementation" in p.read_text(encoding="utf-8")]


_Classes = tuple[tuple[type[nn.Module], ...], tuple[type[PreTrainedModel], ...]]


@functools.cache
def _modeling_files() -> dict[str, _Classes]:
    """Folder -> experts classes and generating classes of each file that has experts."""
    found: dict[str, _Classes] = {}
    # Importing all of transformers' models would take minutes.
    for path in _modeling_paths():
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        classes = [
            c
            for c in vars(module).values()
            if inspect.isclass(c) and c.__module__ == module.__name__
        ]
        # The decorator gives each class it decorates a gate.
        experts = tuple(
            c for c in classes if issubclass(c, nn.Module) and hasattr(c, "_apply_gate")
        )
        generating = tuple(
            c for c in classes if issubclass(c, PreTrainedModel) and c.can_generate()
        )
        found[path.parent.name] = (experts, generating)
    return found


def _family(name: str, classes: _Classes) -> Family:
    experts, generating = classes
    causal = [c for c in generating if c.__name__.endswith("ForCausalLM")]
    chosen = next(iter((*causal, *generating)), None)
    return Family(name=name, model_class=chosen, experts_classes=experts)


_SPARSE = ["dense", *["sparse"] * 3]
_LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}

# Configuration fields that the rules of `tiny_configs` cannot know, by family.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _LINEAR},
    "beam": {"mlp_layer_types": _SPARSE},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _SPARSE, "num_experts_per_tok": TOP_K}},
    "deepseek_v2": {"num_experts_per_tok": TOP_K, "first_k_dense_replace": 1},
    "diffusion_gemma": {
        "text_config": {
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 32,
            "global_head_dim": 16,
        },
        "canvas_length": 32,
    },
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_shared_experts": 1},
    "dots3_note": {
        "sliding_window": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": _SECTIONS, "moe_intermediate_size": [32, 16]}
    },
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": 32,
        "global_head_dim": 16,
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {"text_config": {"mlp_layer_types": _SPARSE, "qk_rope_head_dim": 0}},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": EXPERTS, "moe_topk": TOP_K},
    "hy_v4_vl": {"text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1]}}},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_linear": {"layer_types": _LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "muse_spark": {"audio_config": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe", "mlp", "moe"]},
    # Its hub configurations have these two, its class has no default for them.
    "qwen3_omni_moe": {"vision_start_token_id": 92, "audio_start_token_id": 91},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    # One expert per token, whose small weight needs larger outputs to change tokens.
    "zaya": {"num_experts_per_tok": 1, "initializer_range": 0.4},
}


def tiny(family: Family) -> PreTrainedConfig:
    """Return a tiny configuration of a family's class."""
    assert family.model_class is not None, "a family without a generating class has no model"
    return tiny_config(family.model_class.config_class, OVERRIDES.get(family.name, {}))


def build(family: Family, *, seed: int = 0) -> PreTrainedModel:
    """Return a random model, float32, on the CPU, in eval mode.

    Every parameter and every routing bias is moved off its initial value (norms of ones, biases of
    zeros, routers of zeros), so that a tensor that is lost on the way changes tokens.
    """
    torch.manual_seed(seed)
    assert family.model_class is not None
    model = family.model_class(tiny(family)).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith(("bias", "balancing_biases")) and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer) * 0.05)
    return model
