"""GPT-OSS: MXFP4 experts, all of a layer in one pair of tensors.

`X_blocks` uint8 [E, N, K/32, 16], `X_scales` uint8 [E, N, K/32]; the value is
e2m1(nibble) * 2^(scale - 127), the low nibble being the even column. Row-major, although the plain
module is transposed; the bytes are those of a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specmoe_compile.errors import CheckpointError
from specmoe_compile.hf.quantised.base import Parts, QuantisedFormat
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

CODE = WeightCode(book="e2m1", block=(1, 32), scale="e8m0")


class Mxfp4(QuantisedFormat):
    parts: Mapping[str, str] = {"_blocks": "blocks", "_scales": "scales"}
    needed = frozenset({"blocks", "scales"})
    plain_suffix = ""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` is the checkpoint's `quantization_config`; there is nothing to choose."""

    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        blocks, scales = parts["blocks"].shape, parts["scales"].shape
        if len(blocks) != 4 or blocks[3] != 16 or blocks[:3] != scales:
            raise CheckpointError(
                f"{stem} is not MXFP4: its blocks are {list(blocks)}, its scales {list(scales)}."
            )
        return (blocks[1], blocks[2] * 32), CODE

    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        return WeightPlanes(parts["blocks"].flatten(1), parts["scales"])

    def experts(self, parts: Parts) -> int | None:
        return parts["blocks"].shape[0]
