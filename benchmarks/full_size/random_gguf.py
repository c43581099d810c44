"""GGUF files of random weights in a model's full shape: what llama.cpp is measured with.

A file of 60 GB holds one random block of each kind of tensor, over and over: what is multiplied
takes as long as any weights would, and what the model says is not looked at. Needs the package
`gguf` of llama.cpp. There is no vocabulary in it, but the output product has its full size.

Shape letters: V vocabulary, H hidden, I expert intermediate, E experts, N query heads, G heads of
keys and values, D head size, R latent of keys and values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specmoe_compile.bench.gguf_checkpoint import add_shape

STD = 0.02
BLOCK_BYTES = 8 << 20
WRITERS = 4
ALIGNMENT = 32
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "deepseek_v2": "deepseek2"}

Codes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of GGUF: its name there, values and bytes of a block."""

    name: str
    values: int
    bytes: int


F32, BF16 = Kind("F32", 1, 4), Kind("BF16", 1, 2)
Q4_0, Q8_0 = Kind("Q4_0", 32, 18), Kind("Q8_0", 32, 34)
Q6_K, MXFP4 = Kind("Q6_K", 256, 210), Kind("MXFP4", 32, 17)
FORMATS: Mapping[str, tuple[Kind, Kind, Kind]] = {
    "bf16": (BF16, BF16, BF16),
    "q4_0": (Q4_0, Q4_0, Q6_K),
    "q8_0": (Q8_0, Q8_0, Q8_0),
    "mxfp4": (MXFP4, Q8_0, Q8_0),
}
"""Of the experts, of attention and the embedding, and of the output: as llama.cpp's own tools and
the model's published files have them. Vectors and routers are float32 in all."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: its name, its shape (rows last but one, values of a row last)."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def bytes(self) -> int:
        """What it takes in the file, without padding."""
        return math.prod(self.shape) // self.kind.values * self.kind.bytes

    @property
    def is_expert(self) -> bool:
        return self.name.endswith("_exps.weight")


def tensors(config: Any, form: str) -> Iterator[Tensor]:
    """All tensors of a model, in the order of the file.

    Args:
        config: of Hugging Face's, Qwen3-MoE, GPT-OSS or DeepSeek-V2 without a latent of queries.
        form: of `FORMATS`.
    """
    experts, rest, last = FORMATS[form]
    if config.hidden_size % last.values:
        last = Q8_0  # a row is no whole number of blocks
    oss, mla = config.model_type == "gpt_oss", config.model_type == "deepseek_v2"
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield Tensor("token_embd.weight", (vocabulary, hidden), rest)
    yield Tensor("output_norm.weight", (hidden,), F32)
    yield Tensor("output.weight", (vocabulary, hidden), last)
    for layer in range(config.num_hidden_layers):
        parts = list(_mla(config, rest) if mla else _attention(config, rest, oss=oss))
        if mla and layer < config.first_k_dense_replace:
            parts += _gated(config, rest, config.intermediate_size)
        else:
            parts += _moe(config, experts, oss=oss)
        if mla and layer >= config.first_k_dense_replace:
            inner = config.n_shared_experts * config.moe_intermediate_size
            parts += _gated(config, rest, inner, "_shexp")
        for part in parts:
            yield Tensor(f"blk.{layer}.{part.name}", part.shape, _fitting(part.kind, part.shape))


def _fitting(kind: Kind, shape: tuple[int, ...]) -> Kind:
    """A kind whose blocks are whole in rows of that shape."""
    return BF16 if shape[-1] % kind.values else kind


def _mla(config: Any, kind: Kind) -> Iterator[Tensor]:
    """Attention with latents; what makes keys and values of them is kept by head."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    plain, turned, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    yield Tensor("attn_norm.weight", (hidden,), F32)
    yield Tensor("attn_q.weight", (heads * (plain + turned), hidden), kind)
    yield Tensor("attn_kv_a_mqa.weight", (latent + turned, hidden), kind)
    yield Tensor("attn_kv_a_norm.weight", (latent,), F32)
    yield Tensor("attn_k_b.weight", (heads, latent, plain), kind)
    yield Tensor("attn_v_b.weight", (heads, value, latent), kind)
    yield Tensor("attn_output.weight", (hidden, heads * value), kind)
    yield Tensor("ffn_norm.weight", (hidden,), F32)


def _gated(config: Any, kind: Kind, inner: int, suffix: str = "") -> Iterator[Tensor]:
    """A feed-forward network for every token: of a layer without experts, or shared experts."""
    hidden = config.hidden_size
    sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for name, shape in sizes.items():
        yield Tensor(f"ffn_{name}{suffix}.weight", shape, kind)


def _attention(config: Any, kind: Kind, *, oss: bool) -> Iterator[Tensor]:
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield Tensor("attn_norm.weight", (hidden,), F32)
    sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
    for name, shape in {**sizes, "output": (hidden, queries)}.items():
        yield Tensor(f"attn_{name}.weight", shape, kind)
        if oss:
            yield Tensor(f"attn_{name}.bias", shape[:1], F32)
    if oss:
        yield Tensor("attn_sinks.weight", (config.num_attention_heads,), F32)
        yield Tensor("post_attention_norm.weight", (hidden,), F32)
    else:
        yield Tensor("attn_q_norm.weight", (head,), F32)
        yield Tensor("attn_k_norm.weight", (head,), F32)
        yield Tensor("ffn_norm.weight", (hidden,), F32)


def _moe(config: Any, kind: Kind, *, oss: bool) -> Iterator[Tensor]:
    hidden, inner = config.hidden_size, intermediate(config)
    count = experts_of(config)
    yield Tensor("ffn_gate_inp.weight", (count, hidden), F32)
    if oss:
        yield Tensor("ffn_gate_inp.bias", (count,), F32)
    sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for name, shape in sizes.items():
        yield Tensor(f"ffn_{name}_exps.weight", (count, *shape), kind)
        if oss:
            yield Tensor(f"ffn_{name}_exps.bias", (count, shape[0]), F32)


def intermediate(config: Any) -> int:
    """I of an expert."""
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


def experts_of(config: Any) -> int:
    """E of a layer."""
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    return next(int(getattr(config, name)) for name in names if hasattr(config, name))


def expert_bytes_of_layers(config: Any, form: str) -> list[int]:
    """Bytes of each layer's experts in the file, without their biases."""
    found = [0] * int(config.num_hidden_layers)
    for tensor in tensors(config, form):
        if tensor.is_expert:
            found[int(tensor.name.split(".")[1])] += tensor.bytes
    return found


def write_gguf(path: Path, config: Any, form: str) -> int:
    """Write a file, complete or not at all; one that is there with the right size stays.

    Returns:
        its bytes.

    Raises:
        ValueError: no such model or format.
    """
    import gguf

    if config.model_type not in ARCHITECTURES or form not in FORMATS:
        raise ValueError(
            f"There is no GGUF of {config.model_type} in {form}: models are"
            f" {', '.join(ARCHITECTURES)}, formats {', '.join(FORMATS)}."
        )
    part = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(part, ARCHITECTURES[config.model_type])
    _add_head(writer, config)
    found = list(tensors(config, form))
    for tensor in found:
        raw = gguf.GGMLQuantizationType[tensor.kind.name]
        shape, size = list(tensor.shape), tensor.bytes
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None, "the header is written"
    begin = _aligned(writer.fout[0].tell())
    writer.close()
    total = begin + sum(_aligned(tensor.bytes) for tensor in found)
    if path.exists() and path.stat().st_size == total:
        part.unlink()
        return total
    _fill(part, begin, found, total)
    part.replace(path)
    return total


def _add_head(writer: Any, config: Any) -> None:
    values = {**config.to_dict(), "num_experts": experts_of(config)}
    values["moe_intermediate_size"] = intermediate(config)
    if config.model_type == "deepseek_v2":
        latent, turned = config.kv_lora_rank, config.qk_rope_head_dim
        values |= {"num_key_value_heads": 1, "head_dim": latent + turned, "value_dim": latent}
        _add_latents(writer, config)
    add_shape(writer, values)
    if config.model_type == "gpt_oss":
        import gguf

        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)


def _add_latents(writer: Any, config: Any) -> None:
    """What DeepSeek-V2 has beside a shape; one head of latents serves all queries."""
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _fill(path: Path, begin: int, found: list[Tensor], total: int) -> None:
    """Write all tensors' data behind the head, several pieces at once."""
    blocks = {tensor.kind: random_block(tensor.kind) for tensor in found}
    ones = np.ones(BLOCK_BYTES // 4, np.float32).tobytes()
    handle = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(handle, total)

        def write(tensor: Tensor, offset: int) -> None:
            block = blocks[tensor.kind]
            if tensor.name.endswith("norm.weight"):
                block = ones
            view = memoryview(block)
            for at in range(0, tensor.bytes, len(block)):
                count = min(len(block), tensor.bytes - at)
                done = 0
                while done < count:
                    done += os.pwrite(handle, view[done:count], offset + at + done)

        with ThreadPoolExecutor(WRITERS) as pool:
            jobs = []
            for tensor in found:
                jobs.append(pool.submit(write, tensor, begin))
                begin += _aligned(tensor.bytes)
            for job in jobs:
                job.result()
    finally:
        os.close(handle)


def random_block(kind: Kind) -> bytes:
    """Some 8 MiB of a kind, whole blocks: values of mean 0 and about `STD`."""
    generator = np.random.default_rng(0)
    count = BLOCK_BYTES // kind.bytes
    if kind in (F32, BF16):
        values = (generator.standard_normal(count) * STD).astype(np.float32)
        return (
            values.tobytes()
            if kind == F32
            else (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        )
    codes: Codes = generator.integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    if kind == MXFP4:
        codes[:, 0] = 127 + round(math.log2(STD / 2.9))
        return codes.tobytes()
    rms = {"Q4_0": 4.6, "Q8_0": 74.0, "Q6_K": 18.5}[kind.name]
    scale = np.frombuffer(np.float16(STD / rms).tobytes(), np.uint8)
    if kind == Q6_K:
        codes[:, -18:-2] = 1
        codes[:, -2:] = scale
    else:
        codes[:, :2] = scale
    return codes.tobytes()
