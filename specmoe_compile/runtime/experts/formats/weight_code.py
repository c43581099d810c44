"""How one weight of an expert is coded, and which planes it has in a record.

Shape letters: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specmoe_compile.runtime.experts.formats.code_books import CODE_BOOKS, INT4_ZERO, CodeBook

SCALE_DTYPES: Mapping[str, torch.dtype] = {
    "e8m0": torch.uint8,
    "e4m3": torch.uint8,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
"""Kinds of scales, and the dtype of their plane: those of 8 bits are kept as bytes."""

PlaneShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCode:
    """The code of one weight [N, K]: value = (code - zero) * scale * global, in float32.

    Attributes:
        book: a row of `CODE_BOOKS`. "plain" is floats as they are, and has no scales.
        block: rows and columns that share a scale; 0 is all of them. (1, 32) is MXFP4, (1, 16)
            NVFP4, (128, 128) block FP8, (1, 0) a scale per output, (0, 0) one per tensor.
        scale: one of `SCALE_DTYPES`, None for "plain".
        has_zero: int4 only: groups have zeros of their own, else the code 8 is 0.
        has_global: every output has a float32 factor beside its scales (NVFP4).
    """

    book: str = "plain"
    block: tuple[int, int] = (1, 0)
    scale: str | None = None
    has_zero: bool = False
    has_global: bool = False

    def __post_init__(self) -> None:
        if self.book not in CODE_BOOKS:
            raise ValueError(f"book is {self.book!r}, expected one of {', '.join(CODE_BOOKS)}")
        if self.is_plain != (self.scale is None):
            raise ValueError(f"{self.book!r} with scales of {self.scale}: only plain has none")
        if self.scale is not None and self.scale not in SCALE_DTYPES:
            raise ValueError(f"scale is {self.scale!r}, expected one of {', '.join(SCALE_DTYPES)}")
        if min(self.block) < 0:
            raise ValueError(f"block is {self.block}, expected two numbers, 0 for all")
        if self.has_zero and self.book != "int4":
            raise ValueError(f"only int4 has zeros, got them with {self.book!r}")
        if self.has_global and self.is_plain:
            raise ValueError("plain weights have no global factor")

    @property
    def is_plain(self) -> bool:
        return self.book == "plain"

    @property
    def functions(self) -> CodeBook:
        return CODE_BOOKS[self.book]

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Shape of the scales of a weight [N, K]."""
        rows, columns = self.block
        return -(-outputs // (rows or outputs)), -(-inputs // (columns or inputs))

    def plane_shapes(self, name: str, outputs: int, inputs: int, dtype: torch.dtype) -> PlaneShapes:
        """Planes of the weight `name`, [N, K], in the order of a record.

        Args:
            dtype: of a plain weight; others have that of their code book.
        """
        book = self.functions
        shapes: PlaneShapes = {name: ((outputs, book.columns(inputs)), book.dtype or dtype)}
        if self.scale is None:
            return shapes
        scales = self.scale_shape(outputs, inputs)
        shapes[f"{name}_scales"] = (scales, SCALE_DTYPES[self.scale])
        if self.has_zero:
            shapes[f"{name}_zeros"] = (scales, torch.uint8)
        if self.has_global:
            shapes[f"{name}_global"] = ((outputs,), torch.float32)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a store's header and fingerprint."""
        return {
            "book": self.book,
            "block": list(self.block),
            "scale": self.scale,
            "has_zero": self.has_zero,
            "has_global": self.has_global,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WeightCode:
        """Read what `to_json` wrote; raises `KeyError`, `TypeError` or `ValueError`."""
        rows, columns = data["block"]
        return cls(
            book=data["book"],
            block=(int(rows), int(columns)),
            scale=data["scale"],
            has_zero=bool(data["has_zero"]),
            has_global=bool(data["has_global"]),
        )


PLAIN = WeightCode()


class WeightPlanes(NamedTuple):
    """The planes of one weight, or of a bank of them with a leading dimension [S, ...].

    `codes` [..., N, K/2 or K], `scales` and `zeros` [..., N/rows, K/columns], `global_` [..., N];
    what a code does not have is None.
    """

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    global_: Tensor | None = None

    @classmethod
    def of(cls, views: Mapping[str, Tensor], name: str) -> WeightPlanes:
        """Pick the planes of `name` from the tensors of a record (`ExpertLayout.views`)."""
        return cls(
            views[name],
            views.get(f"{name}_scales"),
            views.get(f"{name}_zeros"),
            views.get(f"{name}_global"),
        )

    def copy_(self, other: WeightPlanes) -> None:
        """Copy planes of the same code and shape into these."""
        for plane, source in zip(self, other, strict=True):
            if plane is not None:
                assert source is not None and plane.shape == source.shape
                plane.copy_(source)

    def rows(self, first: int, count: int, code: WeightCode) -> WeightPlanes:
        """Planes of rows first..first+count of a weight [N, K], as views.

        Both are multiples of the rows of a block, but for the last rows of the weight.
        """
        block = code.block[0]
        blocks = slice(first // block, -(-(first + count) // block)) if block else slice(None)
        return WeightPlanes(
            self.codes[first : first + count],
            None if self.scales is None else self.scales[blocks],
            None if self.zeros is None else self.zeros[blocks],
            None if self.global_ is None else self.global_[first : first + count],
        )


def decode_scales(scales: Tensor, kind: str) -> Tensor:
    """A plane of scales as float32; exact."""
    if kind == "e8m0":
        return scales.view(torch.float8_e8m0fnu).float()
    if kind == "e4m3":
        return scales.view(torch.float8_e4m3fn).float()
    return scales.float()


def dequantise(planes: WeightPlanes, code: WeightCode) -> Tensor:
    """The weight in float32, [..., N, K]: (code - zero) * scale * global, multiplied in this order.

    This is the reference: what a kernel computes with is this number.
    """
    values = code.functions.decode(planes.codes)
    if code.scale is None:
        return values
    assert planes.scales is not None, f"{code} without scales"
    if planes.zeros is not None:
        values = values - (spread(planes.zeros.float(), code, values.shape) - INT4_ZERO)
    values = values * spread(decode_scales(planes.scales, code.scale), code, values.shape)
    if planes.global_ is not None:
        values = values * planes.global_.unsqueeze(-1)
    return values


def spread(groups: Tensor, code: WeightCode, shape: torch.Size) -> Tensor:
    """Repeat what blocks share, [..., N/rows, K/columns], for each of their weights.

    Args:
        shape: [..., N, K]. The result broadcasts to it: a dimension with one block keeps size 1.
    """
    for dim, size in zip((-2, -1), code.block, strict=True):
        if groups.shape[dim] > 1 and size != 1:
            groups = groups.repeat_interleave(size, dim=dim).narrow(dim, 0, shape[dim])
    return groups
