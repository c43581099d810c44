"""Tiny configurations of any model class, by rules on the names of fields.

A field keeps its default unless a rule names it and the default is a number (a default of None, 0
or False turns a feature off, and stays). Lists with one entry per layer are left out, so that the
configuration derives its own pattern of layers again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY, HIDDEN, HEADS, EXPERTS, TOP_K, LAYERS = 96, 64, 4, 8, 2, 4

Value = Callable[[Any], Any]


def _at_most(limit: int) -> Value:
    return lambda default: min(default, limit)


def _constant(value: Any) -> Value:
    return lambda default: value


# The first pattern that matches the whole name counts. Key-value heads stay fewer than query heads
# where the default has fewer.
RULES: tuple[tuple[str, Value], ...] = (
    (r"vocab_size(_per_layer_input)?|unpadded_vocab_size", _constant(VOCABULARY)),
    (r"(moe_|projector_|out_|output_)?hidden_size|d_model|output_dim", _constant(HIDDEN)),
    (r"hidden_size_per_layer_input|router_hidden_size|hc_lowrank|ple_embed_dim", _constant(16)),
    (r"num_hidden_layers", _constant(LAYERS)),
    (r"depth|encoder_layers", _constant(1)),
    (r"(swa_|encoder_)?(num_)?attention_heads|num_heads|linear_num_heads", _constant(HEADS)),
    (r"linear_num_value_heads|index_n_heads", _constant(HEADS)),
    (r"mamba_(num|n)_heads", _constant(8)),
    (
        r"(global_|swa_|linear_|mamba_|index_|linear_key_|linear_value_)?(d_)?head(_dim)?",
        _constant(16),
    ),
    (r"mamba_d_head|mamba_d_state|ssm_state_size|mamba_dt_rank", _constant(16)),
    (r"(q|kv|o)_lora_rank", _constant(16)),
    (r"qk_(rope|nope)_head_dim", _constant(8)),
    (r"qk_head_dim|v_head_dim", _constant(16)),
    (r"(partial_)?rotary_dim", _constant(8)),
    (r".*moe.*intermediate_size", _constant(32)),
    (r".*shared.*intermediate_size", _constant(48)),
    (r".*intermediate_size|.*ffn_dim|mlp_dim|downsample_hidden_size", _constant(96)),
    (r"(num|n)_shared_experts|moe_num_shared_experts", _at_most(2)),
    (r"(moe_)?(num|n)_(local_|routed_)?experts", _constant(EXPERTS)),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", _constant(TOP_K)),
    (r"n_group|num_expert_group|o_groups", _at_most(2)),
    (r"topk_group", _constant(1)),
    (r"first_k_dense_replace|num_dense_layers", _at_most(1)),
    (r"max_position_embeddings|model_max_length|max_source_positions", _constant(256)),
    (r"sliding_window(_size)?|index_topk|rel_extent", _constant(8)),
    (r"((mamba_)?chunk_size|index_block_size)", _constant(8)),
    (r"index_kpool|index_topk_blocks", _constant(4)),
    (r"num_position_embeddings|position_embedding_size", _constant(16)),
    (r"(image|boi|eoi|video|audio|vision)_(\w+_)?token_(id|index)", _constant(VOCABULARY - 1)),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in RULES)


def tiny_config(
    config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    """Build a tiny configuration.

    Args:
        config_class: configuration of a model, or of a part of one.
        overrides: fields that the rules cannot know; a mapping for a field that is itself a
            configuration goes to that one.
    """
    default = config_class()
    layers = _layers_of(default)
    fields: dict[str, Any] = {}
    for name in inspect.signature(config_class.__init__).parameters:
        stored = config_class.attribute_map.get(name, name)
        if name in ("self", "kwargs") or stored not in vars(default):
            continue
        value = vars(default)[stored]
        part = overrides.get(name)
        if isinstance(value, PreTrainedConfig):
            fields[name] = tiny_config(type(value), part or {})
        elif name in overrides:
            fields[name] = part
        elif not (isinstance(value, list | tuple | dict) and _is_per_layer(value, layers)):
            shrunk = _shrink(name, value, vars(default))
            if shrunk is not value:
                fields[name] = shrunk
    extra = {name: value for name, value in overrides.items() if name not in fields}
    # Tied to the embeddings, a random head repeats its input for ever.
    common = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return config_class(**{**common, "initializer_range": 0.2, **fields, **extra})


def _layers_of(config: PreTrainedConfig) -> int:
    return int(vars(config).get("num_hidden_layers") or 0)


def _is_per_layer(value: Any, layers: int) -> bool:
    return len(value) == layers


def _shrink(name: str, value: Any, defaults: Mapping[str, Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return value
    if name.endswith(("key_value_heads", "num_key_heads")):
        # As many as query heads stay as many, fewer stay fewer.
        prefix = name.removesuffix("key_value_heads").removesuffix("key_heads")
        queries = defaults.get(f"{prefix}attention_heads", defaults.get(f"{prefix}value_heads"))
        return HEADS if queries is None or value == queries else min(value, HEADS // 2)
    for pattern, rule in _COMPILED:
        if pattern.fullmatch(name):
            return rule(value)
    return value
