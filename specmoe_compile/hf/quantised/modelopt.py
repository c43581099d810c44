"""NVIDIA ModelOpt: NVFP4, and FP8 with one scale per tensor.

NVFP4: `X.weight` uint8 [N, K/2], `X.weight_scale` e4m3 [N, K/16], `X.weight_scale_2` f32; the value
is e2m1(nibble) * scale * scale_2. FP8: `X.weight` e4m3 [N, K], `X.weight_scale` f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.quantised.base import (
    Parts,
    QuantisedFormat,
    as_bytes,
    matrix_shape,
    scale_kind,
)
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

NVFP4_CODE = WeightCode(book="e2m1", block=(1, 16), scale="e4m3", has_global=True)


class ModelOpt(QuantisedFormat):
    parts: Mapping[str, str] = {
        ".weight_scale_2": "global",
        ".weight_scale": "scales",
        ".weight": "weight",
    }
    needed = frozenset({"weight", "scales"})
    unused = (".input_scale", ".k_scale", ".v_scale", ".k_bias", ".v_bias")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises `UnsupportedModelError` for an algorithm that is neither NVFP4 nor FP8."""
        inner = settings.get("quantization")
        algorithm = settings.get("quant_algo") or (inner or {}).get("quant_algo")
        self._algorithm = str(algorithm).upper()
        if self._algorithm not in ("NVFP4", "FP8"):
            raise UnsupportedModelError(
                f"The checkpoint was quantised by ModelOpt as {algorithm}; specmoe reads NVFP4 and"
                " FP8."
            )

    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        outputs, columns = matrix_shape(stem, parts["weight"])
        stored = parts["weight"].dtype_name
        if self._algorithm == "FP8":
            if stored != "F8_E4M3":
                raise CheckpointError(f"{stem} is {stored}, its configuration says FP8 (e4m3).")
            kind = scale_kind(stem, parts["scales"], ("f32", "bf16", "f16"))
            return (outputs, columns), WeightCode(book="e4m3", block=(0, 0), scale=kind)
        if stored not in ("U8", "F4") or "global" not in parts:
            raise CheckpointError(
                f"{stem} is {stored} {'with' if 'global' in parts else 'without'} weight_scale_2,"
                " its configuration says NVFP4."
            )
        scale_kind(stem, parts["scales"], ("e4m3",))
        return (outputs, columns if stored == "F4" else columns * 2), NVFP4_CODE

    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        if self._algorithm == "FP8":
            return WeightPlanes(as_bytes(parts["weight"]), parts["scales"].reshape(1, 1))
        whole = parts["global"].float().reshape(1).expand(shape[0])
        return WeightPlanes(
            as_bytes(parts["weight"]), as_bytes(parts["scales"]), None, whole.contiguous()
        )
