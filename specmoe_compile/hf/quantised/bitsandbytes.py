"""bitsandbytes nf4.

`X.weight` uint8 [N*K/2, 1], first value in the high nibble; `X.weight.absmax` f32, or uint8 codes
of a second quantisation (`nested_*`); `X.weight.quant_map` f32 [16];
`X.weight.quant_state.bitsandbytes__nf4`, JSON. Blocks run along the flattened weight, so they are
groups of a row only where K is a multiple of the block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.quantised.base import Parts, QuantisedFormat
from specmoe_compile.runtime.experts.formats.code_books import NF4_VALUES
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes


class BitsAndBytes(QuantisedFormat):
    parts: Mapping[str, str] = {
        ".weight.quant_state.bitsandbytes__nf4": "state",
        ".weight.quant_state.bitsandbytes__fp4": "fp4_state",
        ".weight.nested_absmax": "nested_absmax",
        ".weight.nested_quant_map": "nested_map",
        ".weight.absmax": "absmax",
        ".weight.quant_map": "map",
        ".weight": "weight",
    }
    needed = frozenset({"weight", "absmax"})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises `UnsupportedModelError` for 8 bit and for fp4."""
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        if settings.get("load_in_8bit") or kind != "nf4":
            what = "8 bit" if settings.get("load_in_8bit") else kind
            raise UnsupportedModelError(
                f"The checkpoint was quantised by bitsandbytes as {what}; specmoe reads nf4."
            )

    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        if "state" not in parts or "map" not in parts:
            raise CheckpointError(f"{stem} has no quant_state of nf4, as bitsandbytes writes it.")
        state = _state(parts["state"].read())
        outputs, inputs = state["shape"]
        block = int(state["blocksize"])
        if inputs % block:
            raise UnsupportedModelError(
                f"The nf4 blocks of {stem} have {block} values and its rows {inputs}: blocks cross"
                " rows, which specmoe does not read."
            )
        code = WeightCode(book="nf4", block=(1, block), scale="f32")
        return (int(outputs), int(inputs)), code

    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        outputs, inputs = shape
        if not torch.equal(parts["map"].float(), torch.tensor(NF4_VALUES)):
            raise CheckpointError("The checkpoint's table of nf4 values is not the usual one.")
        packed = parts["weight"].view(torch.uint8).reshape(outputs, inputs // 2)
        scales = _absmax(parts).reshape(outputs, -1)
        return WeightPlanes((packed >> 4) | (packed << 4), scales)


def _absmax(parts: Mapping[str, Tensor]) -> Tensor:
    """Scales in float32, unpacked where they are quantised themselves."""
    absmax = parts["absmax"].flatten()
    if absmax.dtype == torch.float32:
        return absmax
    if "nested_absmax" not in parts or "nested_map" not in parts:
        raise CheckpointError(f"bitsandbytes scales of {absmax.dtype} without their own scales.")
    state = _state(parts["state"])
    values = parts["nested_map"].float()[absmax.long()]
    outer = parts["nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
    return values * outer[: len(values)] + float(state["nested_offset"])


def _state(packed: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(packed.flatten().tolist()))
        return {**state, "shape": [int(size) for size in state["shape"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("A bitsandbytes quant_state is damaged.") from error
