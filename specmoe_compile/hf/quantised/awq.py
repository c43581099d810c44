"""AWQ, 4 bit.

`X.qweight` int32 [K, N/8], `X.qzeros` int32 [K/g, N/8], `X.scales` f16 [K/g, N]; the value is
scale * (code - zero), and the nibbles of a word hold columns 0, 2, 4, 6, 1, 3, 5, 7. A record has
the transposed integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.hf.quantised.base import (
    Parts,
    QuantisedFormat,
    group_size,
    matrix_shape,
    scale_kind,
    unpack_int32,
)
from specmoe_compile.runtime.experts.formats.code_books import pack_nibbles
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(QuantisedFormat):
    parts: Mapping[str, str] = {".qweight": "codes", ".qzeros": "zeros", ".scales": "scales"}
    needed = frozenset({"codes", "zeros", "scales"})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises `UnsupportedModelError` for other bits, packings and zeros."""
        bits = settings.get("bits") or settings.get("w_bit")
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if bits != 4 or version != "gemm" or settings.get("zero_point", True) is False:
            raise UnsupportedModelError(
                f"The checkpoint is AWQ with bits={bits}, version={version}, zero_point="
                f"{settings.get('zero_point')}; specmoe reads 4 bits, gemm, with zero points."
            )

    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        inputs, words = matrix_shape(stem, parts["codes"])
        groups, _ = matrix_shape(stem, parts["scales"])
        code = WeightCode(
            book="int4",
            block=(1, group_size(inputs, groups, stem)),
            scale=scale_kind(stem, parts["scales"], ("f16", "bf16", "f32")),
            has_zero=True,
        )
        return (words * 8, inputs), code

    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        codes = unpack_int32(parts["codes"], _ORDER).flatten(1).t()
        zeros = unpack_int32(parts["zeros"], _ORDER).flatten(1).t()
        return WeightPlanes(
            pack_nibbles(codes), parts["scales"].t().contiguous(), zeros.contiguous()
        )
