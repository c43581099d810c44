"""Writes a Qwen3-MoE checkpoint as GGUF, with the package `gguf` of llama.cpp.

The vocabulary is left out (`no_vocab`): tokens are fed and read as ids. Tensors keep their values;
those of the experts of a layer are stacked, as llama.cpp wants them.

Shapes: E experts, H hidden, I expert intermediate; gate and up [E, I, H], down [E, H, I].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specmoe_compile.errors import SpecMoEError

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight$")


def convert(folder: Path, dtype: str, path: Path) -> None:
    """Write `folder` to `path`, one tensor in memory at a time.

    Args:
        folder: a checkpoint whose `model_type` is `qwen3_moe`.
        dtype: of the matrices, "auto" for the checkpoint's; vectors are float32.
        path: the file.

    Raises:
        ValueError: it is another kind of model.
        SpecMoEError: the package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise SpecMoEError(
            "The arm llama_cpp needs the packages gguf and llama-cpp-python: run"
            " pip install 'specmoe-compile[peers]', or leave it out of --arms"
        ) from error
    from specmoe_compile.hf.checkpoint import Checkpoint

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen3_moe":
        raise ValueError(
            f"The arm llama_cpp converts qwen3_moe checkpoints, and {folder.name} is"
            f" {config['model_type']}: leave the arm out of --arms."
        )
    if dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3MOE])
    writer.add_file_type(
        {
            "float32": gguf.LlamaFileType.ALL_F32,
            "float16": gguf.LlamaFileType.MOSTLY_F16,
            "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
        }[dtype]
    )
    if not config.get("norm_topk_prob", False):
        raise ValueError("llama.cpp renormalises the router weights of qwen3_moe; this model not.")
    add_shape(writer, config)
    with Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint:
        parts: dict[str, list[str]] = {}
        for name, sources in _stacks(checkpoint.tensors).items():
            target = names.get_name(name, try_suffixes=(".weight",))
            if target is None:
                raise ValueError(f"GGUF has no name for the tensor {name} of {folder.name}.")
            parts[target] = sources
            _add_info(writer, target, _shape(checkpoint.tensors, sources), dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, sources in parts.items():
            writer.write_tensor_data(_payload(checkpoint.tensors, target, sources, dtype))
    writer.close()


def add_shape(writer: Any, config: Mapping[str, Any]) -> None:
    """Write what a Mixture-of-Experts configuration of Hugging Face's says, and no vocabulary."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config.get("value_dim", config["head_dim"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _stacks(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names without the expert's number, and the tensors that each stands for, in order."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in sorted(tensors):
        match = _EXPERT.match(name)
        if match is None:
            found[name] = [(0, name)]
            continue
        found.setdefault(f"{match[1]}.{match[3]}.weight", []).append((int(match[2]), name))
    return {name: [source for _, source in sorted(parts)] for name, parts in found.items()}


def _shape(tensors: Mapping[str, Any], sources: Sequence[str]) -> list[int]:
    shape = list(tensors[sources[0]].get_shape())
    return [len(sources), *shape] if _EXPERT.match(sources[0]) else shape


def _stored_dtype(name: str, dimensions: int, dtype: str) -> str:
    """Vectors and routers are float32, as llama.cpp's own conversion writes them."""
    return "float32" if dimensions == 1 or "ffn_gate_inp" in name else dtype


def _add_info(writer: Any, name: str, shape: list[int], dtype: str) -> None:
    import gguf
    import numpy as np

    stored = _stored_dtype(name, len(shape), dtype)
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[stored]
    size_bytes = math.prod(shape) * (4 if stored == "float32" else 2)
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size_bytes, raw_dtype=raw)


def _payload(tensors: Mapping[str, Any], name: str, sources: Sequence[str], dtype: str) -> Any:
    """A tensor's data as the file holds it, an array."""
    import torch

    rows = [tensors[source].read() for source in sources]
    data = torch.stack(rows) if _EXPERT.match(sources[0]) else rows[0]
    data = data.to(getattr(torch, _stored_dtype(name, data.dim(), dtype))).contiguous()
    # numpy has no bfloat16; its bytes will do.
    return (data.view(torch.uint8) if data.dtype == torch.bfloat16 else data).numpy()
