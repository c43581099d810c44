"""The codes of a whole expert, and its tensors by the names that they have in a record.

Shape letters: N outputs, K inputs, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specmoe_compile.runtime.experts.formats.weight_code import (
    PLAIN,
    PlaneShapes,
    WeightCode,
    WeightPlanes,
)

UP_NAMES = ("gate_up_proj", "up_proj")
DOWN_NAME = "down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFormat:
    """How the two weights of an expert are coded; they may differ.

    Weights that are not plain are row-major, [N, K], whatever the experts module has.
    """

    up: WeightCode = PLAIN
    down: WeightCode = PLAIN

    @property
    def is_plain(self) -> bool:
        return self.up.is_plain and self.down.is_plain

    @property
    def name(self) -> str:
        """A word or two for people: "MXFP4", "int4, groups of 128"; "" for plain weights."""
        names = dict.fromkeys(_code_name(code) for code in (self.up, self.down))
        return "" if self.is_plain else " and ".join(names)

    @property
    def slug(self) -> str:
        """The name as part of a folder's name, for example "int4-g128"."""
        return self.name.lower().replace(", groups of ", "-g").replace(",", "").replace(" ", "-")

    def code(self, weight: str) -> WeightCode:
        """Code of the weight of that name."""
        return self.down if weight == DOWN_NAME else self.up

    def tensors(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
    ) -> PlaneShapes:
        """Every tensor of an expert, in the order of a record.

        Args:
            shapes: weights [N, K] and biases [N] in the order of a record.
            dtypes: of plain weights and of biases.
        """
        found: PlaneShapes = {}
        for name, shape in shapes.items():
            if name == DOWN_NAME or name in UP_NAMES:
                outputs, inputs = shape
                found |= self.code(name).plane_shapes(name, outputs, inputs, dtypes[name])
            else:
                found[name] = (shape, dtypes[name])
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a store's header and fingerprint."""
        return {"up": self.up.to_json(), "down": self.down.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExpertFormat:
        """Read what `to_json` wrote; raises `KeyError`, `TypeError` or `ValueError`."""
        return cls(up=WeightCode.from_json(data["up"]), down=WeightCode.from_json(data["down"]))

    def check(self, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Raise `ValueError` unless the tensors of a record are those of this format."""
        for name in (*UP_NAMES, DOWN_NAME):
            if name not in tensors or self.code(name).is_plain:
                continue
            code, (shape, dtype) = self.code(name), tensors[name]
            inputs = shape[1] * 2 if code.functions.bits == 4 else shape[1]
            expected = code.plane_shapes(name, shape[0], inputs, dtype)
            if {plane: tensors.get(plane) for plane in expected} != expected:
                raise ValueError(f"the planes of {name} are not those of {_code_name(code)}")


PLAIN_FORMAT = ExpertFormat()

_KNOWN_NAMES: Mapping[tuple[str, tuple[int, int], str | None], str] = {
    ("e2m1", (1, 32), "e8m0"): "MXFP4",
    ("e2m1", (1, 16), "e4m3"): "NVFP4",
}
_BOOK_NAMES = {"e4m3": "FP8", "e2m1": "FP4"}


def _code_name(code: WeightCode) -> str:
    if code.is_plain:
        return "plain"
    known = _KNOWN_NAMES.get((code.book, code.block, code.scale))
    if known is not None:
        return known
    name = _BOOK_NAMES.get(code.book, code.book)
    rows, columns = code.block
    if (rows, columns) == (1, 0):
        return f"{name} per channel"
    if (rows, columns) == (0, 0):
        return f"{name} per tensor"
    return f"{name}, groups of {columns}" if rows == 1 else f"{name}, blocks of {rows}x{columns}"


class ExpertTensors(NamedTuple):
    """The tensors of one expert, or of a bank of slots with a leading dimension [S, ...].

    `up`: planes of [2I or I, H]; `down`: of [H, I]; biases [2I or I] and [H], or None. Plain
    weights lie as the experts module has them, which may be transposed.
    """

    up: WeightPlanes
    up_bias: Tensor | None
    down: WeightPlanes
    down_bias: Tensor | None

    @classmethod
    def of(cls, views: Mapping[str, Tensor]) -> ExpertTensors:
        """Name the tensors of a record (`ExpertLayout.views`, `ExpertLayout.bank_views`)."""
        name = next(name for name in UP_NAMES if name in views)
        return cls(
            WeightPlanes.of(views, name),
            views.get(f"{name}_bias"),
            WeightPlanes.of(views, DOWN_NAME),
            views.get(f"{DOWN_NAME}_bias"),
        )
