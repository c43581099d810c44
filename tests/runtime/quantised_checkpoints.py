"""Tiny checkpoints of every quantised format, beside the plain one that each of them means.

The values are computed here from the definitions of the formats, in numpy's integers and floats,
and without the package. The plain checkpoint has them in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

Coded = tuple[dict[str, Tensor], np.ndarray]
"""Tensors of one weight by the suffix of their keys, and its values [N, K] in float32."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
GROUP = 32
BLOCK = 48  # of FP8; no divisor of 64, so that blocks are cut and gate and up cannot share one


def _random(n: int, k: int, high: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, high, (n, k))


def _words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[..., C] of 0..15 -> [..., C/8] int32; nibble i holds column order[i]."""
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for nibble, column in enumerate(order):
        words |= codes[..., column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32).copy())


def _pairs(codes: np.ndarray, *, high_first: bool = False) -> Tensor:
    first, second = (4, 0) if high_first else (0, 4)
    pairs = (codes[..., ::2] << first) | (codes[..., 1::2] << second)
    return torch.from_numpy(pairs.astype(np.uint8))


def _scales(shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy((rng.random(shape) + 0.5).astype(np.float32) * 0.03).to(dtype)


def _spread(scales: np.ndarray, rows: int, columns: int, shape: tuple[int, int]) -> np.ndarray:
    return np.repeat(np.repeat(scales, rows, 0), columns, 1)[: shape[0], : shape[1]]


def mxfp4(n: int, k: int, rng: np.random.Generator) -> Coded:
    codes, powers = _random(n, k, 16, rng), rng.integers(119, 123, (n, k // 32))
    values = E2M1[codes] * _spread(np.float32(2.0) ** (powers - 127), 1, 32, (n, k))
    scales = torch.from_numpy(powers.astype(np.uint8))
    return {".weight_packed": _pairs(codes), ".weight_scale": scales}, values


def deepseek_fp4(n: int, k: int, rng: np.random.Generator) -> Coded:
    tensors, values = mxfp4(n, k, rng)
    return {
        ".weight": tensors[".weight_packed"].view(torch.int8),
        ".scale": tensors[".weight_scale"].view(torch.float8_e8m0fnu),
    }, values


def _nvfp4(n: int, k: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    codes = _random(n, k, 16, rng)
    scales = torch.from_numpy(rng.random((n, k // 16)).astype(np.float32) * 200 + 1)
    scales = scales.to(torch.float8_e4m3fn)
    # A power of two, so that its reciprocal is exact and both conventions mean the same number.
    whole = torch.tensor([2.0 ** -int(rng.integers(10, 13))])
    values = E2M1[codes] * _spread(scales.float().numpy(), 1, 16, (n, k)) * whole.numpy()
    return _pairs(codes), scales, whole, values


def nvfp4_divisor(n: int, k: int, rng: np.random.Generator) -> Coded:
    packed, scales, whole, values = _nvfp4(n, k, rng)
    return {
        ".weight_packed": packed,
        ".weight_scale": scales,
        ".weight_global_scale": 1 / whole,
        ".input_global_scale": torch.ones(1),
    }, values


def nvfp4_factor(n: int, k: int, rng: np.random.Generator) -> Coded:
    packed, scales, whole, values = _nvfp4(n, k, rng)
    return {
        ".weight": packed,
        ".weight_scale": scales,
        ".weight_scale_2": whole.reshape(()),
        ".input_scale": torch.ones(()),
    }, values


def _e4m3(n: int, k: int, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    weight = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32) * 4)
    weight = weight.to(torch.float8_e4m3fn)
    return weight, weight.float().numpy()


def fp8_block(n: int, k: int, rng: np.random.Generator) -> Coded:
    weight, values = _e4m3(n, k, rng)
    scales = _scales((-(-n // BLOCK), -(-k // BLOCK)), torch.float32, rng)
    spread = _spread(scales.numpy(), BLOCK, BLOCK, (n, k))
    return {".weight": weight, ".weight_scale_inv": scales}, values * spread


def fp8_channel(n: int, k: int, rng: np.random.Generator) -> Coded:
    weight, values = _e4m3(n, k, rng)
    scales = _scales((n, 1), torch.bfloat16, rng)
    return {".weight": weight, ".weight_scale": scales}, values * scales.float().numpy()


def fp8_tensor(n: int, k: int, rng: np.random.Generator) -> Coded:
    weight, values = _e4m3(n, k, rng)
    scales = _scales((1,), torch.float32, rng)
    return {".weight": weight, ".weight_scale": scales}, values * scales.numpy()


def int8_channel(n: int, k: int, rng: np.random.Generator) -> Coded:
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    scales = _scales((n, 1), torch.float32, rng) / 20
    values = codes.astype(np.float32) * scales.numpy()
    return {".weight": torch.from_numpy(codes), ".weight_scale": scales}, values


def int4_symmetric(n: int, k: int, rng: np.random.Generator) -> Coded:
    codes, scales = _random(n, k, 16, rng), _scales((n, k // GROUP), torch.bfloat16, rng)
    spread = _spread(scales.float().numpy(), 1, GROUP, (n, k))
    return {
        ".weight_packed": _words(codes),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor([n, k]),
    }, (codes - 8).astype(np.float32) * spread


def int4_zeros(n: int, k: int, rng: np.random.Generator) -> Coded:
    codes, zeros = _random(n, k, 16, rng), _random(n, k // GROUP, 16, rng)
    scales = _scales((n, k // GROUP), torch.bfloat16, rng)
    spread = _spread(scales.float().numpy(), 1, GROUP, (n, k))
    shift = codes - _spread(zeros, 1, GROUP, (n, k))
    return {
        ".weight_packed": _words(codes),
        ".weight_scale": scales,
        ".weight_zero_point": _words(np.ascontiguousarray(zeros.T)).t().contiguous(),
        ".weight_shape": torch.tensor([n, k]),
    }, shift.astype(np.float32) * spread


def _gptq(n: int, k: int, rng: np.random.Generator, symmetric: bool) -> Coded:
    codes = _random(n, k, 16, rng)
    zeros = np.full((n, k // GROUP), 8) if symmetric else rng.integers(1, 17, (n, k // GROUP))
    scales = _scales((n, k // GROUP), torch.float16, rng)
    shift = codes - _spread(zeros, 1, GROUP, (n, k))
    return {
        ".qweight": _words(codes).t().contiguous(),
        ".qzeros": _words(np.ascontiguousarray(zeros.T - 1)),
        ".scales": scales.t().contiguous(),
        ".g_idx": (torch.arange(k) // GROUP).int(),
    }, shift.astype(np.float32) * _spread(scales.float().numpy(), 1, GROUP, (n, k))


def gptq(n: int, k: int, rng: np.random.Generator) -> Coded:
    return _gptq(n, k, rng, symmetric=True)


def gptq_zeros(n: int, k: int, rng: np.random.Generator) -> Coded:
    return _gptq(n, k, rng, symmetric=False)


def awq(n: int, k: int, rng: np.random.Generator) -> Coded:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros = _random(n, k, 16, rng), _random(n, k // GROUP, 16, rng)
    scales = _scales((n, k // GROUP), torch.float16, rng)
    shift = codes - _spread(zeros, 1, GROUP, (n, k))
    return {
        ".qweight": _words(np.ascontiguousarray(codes.T), order),
        ".qzeros": _words(np.ascontiguousarray(zeros.T), order),
        ".scales": scales.t().contiguous(),
    }, shift.astype(np.float32) * _spread(scales.float().numpy(), 1, GROUP, (n, k))


def nf4(n: int, k: int, rng: np.random.Generator) -> Coded:
    codes, scales = _random(n, k, 16, rng), _scales((n, k // 64), torch.float32, rng) * 3
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    return {
        ".weight": _pairs(codes, high_first=True).reshape(-1, 1),
        ".weight.absmax": scales.flatten(),
        ".weight.quant_map": torch.from_numpy(NF4),
        ".weight.quant_state.bitsandbytes__nf4": _json_tensor(state),
    }, NF4[codes] * _spread(scales.numpy(), 1, 64, (n, k))


def nf4_nested(n: int, k: int, rng: np.random.Generator) -> Coded:
    tensors, _ = nf4(n, k, rng)
    absmax = rng.integers(0, 256, n * k // 64).astype(np.uint8)
    table = np.linspace(-1, 1, 256).astype(np.float32)
    outer = (rng.random(-(-len(absmax) // 256)) + 0.5).astype(np.float32) * 0.03
    offset = 0.07
    codes = NF4[_unpair(tensors[".weight"].reshape(n, k // 2).numpy())]
    scales = table[absmax] * np.repeat(outer, 256)[: len(absmax)] + np.float32(offset)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [n, k],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return {
        **tensors,
        ".weight.absmax": torch.from_numpy(absmax),
        ".weight.nested_absmax": torch.from_numpy(outer),
        ".weight.nested_quant_map": torch.from_numpy(table),
        ".weight.quant_state.bitsandbytes__nf4": _json_tensor(state),
    }, codes * _spread(scales.reshape(n, k // 64), 1, 64, (n, k))


def _unpair(packed: np.ndarray) -> np.ndarray:
    return np.stack((packed >> 4, packed & 15), -1).reshape(packed.shape[0], -1)


def _json_tensor(value: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _ct(format: str, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Variety:
    """A format: how a weight is made, and what config.json says.

    `experts_only`: attention is not quantised; it is with the others, but for lm_head and router.
    """

    make: Callable[[int, int, np.random.Generator], Coded]
    settings: dict[str, Any]
    name: str
    experts_only: bool = False


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

VARIETIES: dict[str, Variety] = {
    "fp8_block": Variety(fp8_block, {**_FP8, "weight_block_size": [BLOCK, BLOCK]}, "FP8, "),
    "deepseek_fp4": Variety(
        deepseek_fp4,
        {**_FP8, "weight_block_size": [BLOCK, BLOCK], "expert_dtype": "fp4"},
        "MXFP4",
        experts_only=True,
    ),
    "ct_fp8_channel": Variety(
        fp8_channel, _ct("float-quantized", num_bits=8, type="float", strategy="channel"), "FP8 per"
    ),
    "ct_fp8_tensor": Variety(
        fp8_tensor, _ct("float-quantized", num_bits=8, type="float", strategy="tensor"), "FP8 per"
    ),
    "ct_int8": Variety(
        int8_channel, _ct("int-quantized", num_bits=8, strategy="channel"), "int8 per"
    ),
    "ct_int4": Variety(int4_symmetric, _ct("pack-quantized", group_size=GROUP), "int4, groups"),
    "ct_int4_zeros": Variety(
        int4_zeros, _ct("pack-quantized", group_size=GROUP, symmetric=False), "int4, groups"
    ),
    "ct_nvfp4": Variety(
        nvfp4_divisor, _ct("nvfp4-pack-quantized", type="float", group_size=16), "NVFP4"
    ),
    "ct_mxfp4": Variety(mxfp4, _ct("mxfp4-pack-quantized", type="float", group_size=32), "MXFP4"),
    "modelopt_nvfp4": Variety(
        nvfp4_factor, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"
    ),
    "modelopt_fp8": Variety(
        fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8 per"
    ),
    "gptq": Variety(gptq, {**_GPTQ, "sym": True}, "int4, groups"),
    "gptq_zeros": Variety(gptq_zeros, {**_GPTQ, "sym": False}, "int4, groups"),
    "awq": Variety(
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        "int4, groups",
    ),
    "nf4": Variety(nf4, _BNB, "nf4, groups"),
    "nf4_nested": Variety(nf4_nested, {**_BNB, "bnb_4bit_use_double_quant": True}, "nf4, groups"),
}


def qwen3_moe() -> Any:
    """A plain random Qwen3-MoE whose sizes every format can hold, in float32."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def write_pair(variety: str, folder: Path) -> tuple[Path, Path]:
    """Write a quantised Qwen3-MoE and its plain float32 form; returns both folders."""
    kind = VARIETIES[variety]
    plain, coded = folder / "plain", folder / "coded"
    qwen3_moe().save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    rng = np.random.default_rng(0)
    quantised: dict[str, Tensor] = {}
    for key in sorted(tensors):
        stem = key.removesuffix(".weight")
        if stem.endswith("_proj") and (".experts." in stem or not kind.experts_only):
            n, k = tensors[key].shape
            parts, values = kind.make(n, k, rng)
            quantised.update({stem + suffix: part for suffix, part in parts.items()})
            tensors[key] = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        else:
            quantised[key] = tensors[key]
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    write_folder(coded, quantised, plain, kind.settings)
    return coded, plain


def write_folder(
    folder: Path, tensors: dict[str, Tensor], like: Path, settings: dict[str, Any] | None
) -> None:
    """Write a checkpoint with another one's configuration."""
    folder.mkdir()
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((like / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
