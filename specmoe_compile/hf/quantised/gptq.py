"""GPTQ, 4 bit, without an order of its own (act-order).

`X.qweight` int32 [K/8, N], `X.qzeros` int32 [K/g, N/8], `X.scales` f16 [K/g, N], `X.g_idx` int32
[K]; the value is scale * (code - (zero + 1)), low nibbles first. `checkpoint_format` "gptq_v2"
stores the zero itself. A record has the transposed integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.quantised.base import (
    Parts,
    QuantisedFormat,
    group_size,
    matrix_shape,
    scale_kind,
    unpack_int32,
)
from specmoe_compile.runtime.experts.formats.code_books import INT4_ZERO, pack_nibbles
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes


class Gptq(QuantisedFormat):
    parts: Mapping[str, str] = {
        ".qweight": "codes",
        ".qzeros": "zeros",
        ".scales": "scales",
        ".g_idx": "g_idx",
    }
    needed = frozenset({"codes", "zeros", "scales"})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read bits, symmetry and how zeros are stored; raises `UnsupportedModelError`."""
        bits = settings.get("bits")
        if bits != 4:
            raise UnsupportedModelError(
                f"The checkpoint is GPTQ with {bits} bits; specmoe reads 4."
            )
        stored = settings.get("checkpoint_format") or "gptq"
        if stored not in ("gptq", "gptq_v2"):
            raise UnsupportedModelError(
                f"The checkpoint is GPTQ in the format {stored}; specmoe reads gptq and gptq_v2."
            )
        self._has_zero = not settings.get("sym", True)
        self._zero_offset = 1 if stored == "gptq" else 0

    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        words, outputs = matrix_shape(stem, parts["codes"])
        groups, _ = matrix_shape(stem, parts["scales"])
        inputs = words * 8
        code = WeightCode(
            book="int4",
            block=(1, group_size(inputs, groups, stem)),
            scale=scale_kind(stem, parts["scales"], ("f16", "bf16", "f32")),
            has_zero=self._has_zero,
        )
        return (outputs, inputs), code

    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        outputs, inputs = shape
        groups = parts["scales"].shape[0]
        self._check_order(parts.get("g_idx"), inputs, groups)
        codes = unpack_int32(parts["codes"].t()).reshape(outputs, inputs)
        zeros = unpack_int32(parts["zeros"]).reshape(groups, outputs).t() + self._zero_offset
        if not self._has_zero and bool((zeros != INT4_ZERO).any()):
            raise CheckpointError(
                "The checkpoint's quantization_config says that its GPTQ weights are symmetric, but"
                " their zeros are not 8."
            )
        return WeightPlanes(
            pack_nibbles(codes),
            parts["scales"].t().contiguous(),
            zeros.contiguous() if self._has_zero else None,
        )

    @staticmethod
    def _check_order(g_idx: Tensor | None, inputs: int, groups: int) -> None:
        if g_idx is None:
            return
        in_order = torch.arange(inputs) // (inputs // groups)
        if not torch.equal(g_idx.long(), in_order):
            raise UnsupportedModelError(
                "The checkpoint is GPTQ with act-order (desc_act): its groups are permuted, which"
                " specmoe does not read. Take one that was quantised with desc_act=False."
            )
