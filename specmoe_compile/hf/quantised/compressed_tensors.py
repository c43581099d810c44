"""compressed-tensors: int4 and int8, FP8, NVFP4 and MXFP4; each group of layers its own.

| format | tensors beside `X.weight_scale` |
|---|---|
| pack-quantized | `X.weight_packed` int32 [N, K/8], low nibble first; `X.weight_shape`; perhaps `X.weight_zero_point` int32 [N/8, K/g] |
| int-quantized, float-quantized, naive-quantized | `X.weight` int8 or e4m3 [N, K] |
| nvfp4-pack-quantized | `X.weight_packed` uint8 [N, K/2], `X.weight_global_scale` f32 [1], a *divisor* |
| mxfp4-pack-quantized | `X.weight_packed` uint8 [N, K/2] |
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.quantised import modelopt, mxfp4
from specmoe_compile.hf.quantised.base import (
    Parts,
    QuantisedFormat,
    as_bytes,
    group_size,
    matrix_shape,
    scale_kind,
)
from specmoe_compile.runtime.experts.formats.code_books import INT4_ZERO, unpack_nibbles
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

_FLOAT_SCALES = ("f32", "bf16", "f16")
_EIGHT_BIT = ("int-quantized", "float-quantized", "naive-quantized")
_READ = ("pack-quantized", *_EIGHT_BIT, "nvfp4-pack-quantized", "mxfp4-pack-quantized")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What `config_groups` says about the weights of some layers."""

    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    strategy: str
    block: tuple[int, int] | None
    symmetric: bool

    @property
    def words(self) -> str:
        zero = "" if self.symmetric else " with zero points"
        return f"{self.bits} bit {self.kind} in {self.format}, per {self.strategy}{zero}"


class CompressedTensors(QuantisedFormat):
    parts: Mapping[str, str] = {
        ".weight_packed": "packed",
        ".weight_global_scale": "global",
        ".weight_zero_point": "zeros",
        ".weight_scale": "scales",
        ".weight_shape": "shape",
        ".weight_g_idx": "g_idx",
        ".weight": "weight",
    }
    needed = frozenset({"scales"})
    unused = (
        ".input_scale",
        ".input_zero_point",
        ".input_global_scale",
        ".output_scale",
        ".k_scale",
        ".v_scale",
        ".q_scale",
    )

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read the groups of layers; raises `UnsupportedModelError` for sparse weights."""
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise UnsupportedModelError(
                f"The checkpoint's weights are sparse ({sparsity}); specmoe reads dense ones."
            )
        default = str(settings.get("format") or "")
        groups = (settings.get("config_groups") or {}).values()
        self._groups = [_group(group, default) for group in groups if group.get("weights")]

    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        group = self._group(stem)
        main = parts.get("packed") or parts.get("weight")
        if main is None:
            raise CheckpointError(f"{stem} has scales, but no weight_packed and no weight.")
        if "g_idx" in parts:
            raise UnsupportedModelError(
                f"{stem} is quantised with an order of its own (act-order): its groups are"
                " permuted, which specmoe does not read."
            )
        outputs, columns = matrix_shape(stem, main)
        if group.format in _EIGHT_BIT:
            return (outputs, columns), _eight_bit_code(stem, group, parts)
        if group.format == "nvfp4-pack-quantized" and "global" in parts:
            scale_kind(stem, parts["scales"], ("e4m3",))
            return (outputs, columns * 2), modelopt.NVFP4_CODE
        if group.format == "mxfp4-pack-quantized" and group.symmetric:
            return (outputs, columns * 2), mxfp4.CODE
        if group.format != "pack-quantized" or group.kind != "int" or group.bits not in (4, 8):
            raise _not_read(stem, group)
        return _packed_code(stem, group, parts, outputs)

    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        outputs, inputs = shape
        scales = parts["scales"]
        if "global" in parts:
            # Kept as a factor: every other format multiplies.
            whole = parts["global"].float().reciprocal().reshape(1).expand(outputs)
            return WeightPlanes(parts["packed"], as_bytes(scales), None, whole.contiguous())
        if "packed" in parts and parts["packed"].dtype != torch.int32:
            return WeightPlanes(parts["packed"], as_bytes(scales))
        if scales.dim() < 2:
            scales = scales.reshape(-1, 1)
        if "weight" in parts:
            codes = parts["weight"]
            return WeightPlanes(codes if codes.dtype == torch.int8 else as_bytes(codes), scales)
        words = as_bytes(parts["packed"].contiguous())
        if words.shape[1] >= inputs:  # 8 bit: one code in a byte, 128 being 0
            return WeightPlanes((words[:, :inputs].to(torch.int16) - 128).to(torch.int8), scales)
        zeros = parts.get("zeros")
        return WeightPlanes(
            words[:, : inputs // 2].contiguous(),
            scales,
            None if zeros is None else _zeros(zeros, outputs),
        )

    def _group(self, stem: str) -> _Group:
        """The group of a layer: one that names it before one that names its kind."""
        named = [group for group in self._groups if any(_names(t, stem) for t in group.targets)]
        linear = [group for group in self._groups if "Linear" in group.targets]
        found = [*named, *linear]
        if not found:
            raise CheckpointError(
                f"{stem} has scales, but no group of the checkpoint's quantization_config is about"
                " it."
            )
        return found[0]


def _names(target: str, stem: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], stem) is not None
    return stem == target or stem.endswith(f".{target}")


def _group(group: Mapping[str, Any], default_format: str) -> _Group:
    weights = group["weights"]
    block = weights.get("block_structure")
    return _Group(
        targets=tuple(group.get("targets") or ()),
        format=str(group.get("format") or default_format),
        bits=int(weights.get("num_bits") or 0),
        kind=str(weights.get("type")),
        strategy=str(weights.get("strategy")),
        block=None if block is None else (int(block[0]), int(block[1])),
        symmetric=bool(weights.get("symmetric", True)),
    )


def _not_read(stem: str, group: _Group) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{stem} is {group.words} of compressed-tensors, which specmoe does not read; it reads"
        f" {', '.join(_READ)}."
    )


def _eight_bit_code(stem: str, group: _Group, parts: Parts) -> WeightCode:
    stored = parts["weight"].dtype_name if "weight" in parts else "missing"
    books = {"int": ("int8", "I8"), "float": ("e4m3", "F8_E4M3")}
    if group.kind not in books or group.bits != 8 or not group.symmetric:
        raise _not_read(stem, group)
    book, expected = books[group.kind]
    if stored != expected:
        raise CheckpointError(f"{stem} is {stored}, its configuration says {group.words}.")
    scales = parts["scales"]
    kind = scale_kind(stem, scales, _FLOAT_SCALES)
    inputs = parts["weight"].shape[1]
    if group.strategy == "block" and group.block is not None:
        return WeightCode(book=book, block=group.block, scale=kind)
    if group.strategy == "tensor":
        return WeightCode(book=book, block=(0, 0), scale=kind)
    if group.strategy == "channel":
        return WeightCode(book=book, block=(1, 0), scale=kind)
    if group.strategy == "group":
        groups = matrix_shape(stem, scales)[1]
        return WeightCode(book=book, block=(1, group_size(inputs, groups, stem)), scale=kind)
    raise _not_read(stem, group)


def _packed_code(
    stem: str, group: _Group, parts: Parts, outputs: int
) -> tuple[tuple[int, int], WeightCode]:
    """Shape and code of integers that are packed into 32-bit words."""
    if "shape" not in parts:
        raise CheckpointError(f"{stem} has no weight_shape, as pack-quantized needs.")
    inputs = int(parts["shape"].read()[-1])
    if group.strategy not in ("group", "channel"):
        raise _not_read(stem, group)
    groups = parts["scales"].shape[1] if len(parts["scales"].shape) == 2 else 1
    has_zero = not group.symmetric
    if has_zero and (group.bits != 4 or "zeros" not in parts):
        raise _not_read(stem, group)
    code = WeightCode(
        book="int4" if group.bits == 4 else "int8",
        block=(1, 0) if groups == 1 else (1, group_size(inputs, groups, stem)),
        scale=scale_kind(stem, parts["scales"], _FLOAT_SCALES),
        has_zero=has_zero,
    )
    return (outputs, inputs), code


def _zeros(zeros: Tensor, outputs: int) -> Tensor:
    """Zeros as codes, [N, K/g] uint8; packed along N, or signed numbers as they are."""
    if zeros.dtype != torch.int32:
        return (zeros.to(torch.int16) + INT4_ZERO).to(torch.uint8)
    nibbles = unpack_nibbles(as_bytes(zeros.t().contiguous()))
    return nibbles[:, :outputs].t().contiguous()
