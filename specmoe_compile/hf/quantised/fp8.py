"""FP8 as DeepSeek-V3 and Qwen3 store it: e4m3 weights, scales per block, to be multiplied.

`X.weight` e4m3 [N, K], `X.weight_scale_inv` (or `.scale`) [ceil(N/128), ceil(K/128)]; without
`weight_block_size` one number for the whole weight. DeepSeek-V4 keeps its experts in MXFP4 beside
it: `X.weight` int8 [N, K/2], `X.scale` e8m0 [N, K/32].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.quantised import mxfp4
from specmoe_compile.hf.quantised.base import (
    Parts,
    QuantisedFormat,
    as_bytes,
    matrix_shape,
    scale_kind,
)
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

_SCALES = ("f32", "bf16", "f16", "e8m0")


class BlockFp8(QuantisedFormat):
    parts: Mapping[str, str] = {
        ".weight_scale_inv": "scales",
        ".scale": "scales",
        ".weight": "weight",
    }
    needed = frozenset({"weight", "scales"})
    unused = (".activation_scale", ".input_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read block sizes, and what the experts are kept in.

        Raises:
            UnsupportedModelError: another float than e4m3, or other experts than FP8 and FP4.
        """
        block = settings.get("weight_block_size")
        self._block = (0, 0) if block is None else (int(block[0]), int(block[1]))
        self._expert_dtype = str(settings.get("expert_dtype") or "fp8")
        fmt = str(settings.get("fmt") or "e4m3")
        if fmt not in ("e4m3", "float8_e4m3fn"):
            raise UnsupportedModelError(
                f"The checkpoint's FP8 weights are {fmt}; specmoe reads e4m3."
            )
        if self._expert_dtype not in ("fp8", "fp4"):
            raise UnsupportedModelError(
                f"The checkpoint's experts are {self._expert_dtype}; specmoe reads fp8 and fp4."
            )

    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        outputs, inputs = matrix_shape(stem, parts["weight"])
        stored = parts["weight"].dtype_name
        if self._expert_dtype == "fp4" and ".experts." in stem:
            if stored not in ("I8", "U8", "F4"):
                raise CheckpointError(f"{stem} is {stored}, its configuration says FP4.")
            return (outputs, inputs if stored == "F4" else inputs * 2), mxfp4.CODE
        if stored != "F8_E4M3":
            raise CheckpointError(f"{stem} is {stored}, its configuration says FP8 (e4m3).")
        kind = scale_kind(stem, parts["scales"], _SCALES)
        return (outputs, inputs), WeightCode(book="e4m3", block=self._block, scale=kind)

    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        scales = parts["scales"]
        if scales.numel() == 1:
            scales = scales.reshape(1, 1)
        return WeightPlanes(as_bytes(parts["weight"]), _as_plane(scales))


def _as_plane(scales: Tensor) -> Tensor:
    return as_bytes(scales) if scales.element_size() == 1 else scales
