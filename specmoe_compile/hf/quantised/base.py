"""What a format of quantised checkpoints is asked, and weights that are made of several tensors.

A weight of a quantised checkpoint is a few tensors with a common stem, for example
`...gate_proj.weight` and `...gate_proj.weight_scale_inv`. Together they stand for one tensor of
the plain checkpoint, whose name (the *plain key*) the conversions of transformers know.

Shape letters: E experts, N outputs, K inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.checkpoint import CheckpointTensor
from specmoe_compile.runtime.experts.formats.weight_code import (
    WeightCode,
    WeightPlanes,
    dequantise,
)

Parts = Mapping[str, CheckpointTensor]

SCALE_KINDS = {"F32": "f32", "BF16": "bf16", "F16": "f16", "F8_E8M0": "e8m0", "F8_E4M3": "e4m3"}
"""safetensors' names of the dtypes that a scale can have."""


class QuantisedFormat(ABC):
    """One way to store quantised weights.

    Attributes:
        parts: `{suffix of a key: name of the part}`; a longer suffix comes before one it ends in.
        needed: parts that a weight must have to be of this format; without them a key is plain.
        plain_suffix: what takes the suffix's place in the plain key.
        settings: the checkpoint's `quantization_config`.
        unused: suffixes of tensors that only activations and caches use; they are left out.
    """

    settings: Mapping[str, Any]
    parts: Mapping[str, str]
    needed: frozenset[str]
    plain_suffix = ".weight"
    unused: tuple[str, ...] = ()

    @abstractmethod
    def describe(self, stem: str, parts: Parts) -> tuple[tuple[int, int], WeightCode]:
        """Shape [N, K] and code of a weight, without reading it.

        Raises:
            UnsupportedModelError: a variant of the format that cannot be read.
            CheckpointError: the tensors do not fit together.
        """

    @abstractmethod
    def planes(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightPlanes:
        """The planes of one weight [N, K], from its tensors.

        Raises:
            UnsupportedModelError: what only the values show, such as an order of groups.
        """

    def experts(self, parts: Parts) -> int | None:
        """E if one set of tensors holds all experts of a layer along dimension 0, else None."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedWeight:
    """One weight of a checkpoint, not read yet; also a lazy tensor of its plain values.

    Attributes:
        stem: the common part of the tensors' names.
        keys: the tensors' names.
        parts: its tensors in the checkpoint.
        shape: [N, K] of one expert.
        code: how it is coded.
        num_experts: E where the tensors hold all experts of a layer, else None.
    """

    format: QuantisedFormat
    stem: str
    keys: tuple[str, ...]
    parts: Parts
    shape: tuple[int, int]
    code: WeightCode
    num_experts: int | None = None

    def planes(self, expert: int | None = None) -> WeightPlanes:
        """Read the planes; of one expert where the tensors hold all of a layer.

        Raises:
            CheckpointError: the planes do not have the shapes that the code promises.
        """
        read = {
            name: part.read() if expert is None else part.read_rows(expert, 1)[0]
            for name, part in self.parts.items()
        }
        planes = self.format.planes(read, self.shape)
        expected = self.code.plane_shapes("codes", *self.shape, torch.float32)
        for (name, (shape, dtype)), plane in zip(
            expected.items(), (p for p in planes if p is not None), strict=True
        ):
            if (tuple(plane.shape), plane.dtype) != (shape, dtype):
                raise CheckpointError(
                    f"The {name} of {self.stem} are {tuple(plane.shape)} {plane.dtype}; a weight"
                    f" {list(self.shape)} coded as {self.code.book} needs {shape} {dtype}."
                )
        return planes

    # What the loader of transformers asks of a lazy tensor (a safetensors slice).
    def __getitem__(self, index: Any) -> Tensor:
        if self.num_experts is None:
            return dequantise(self.planes(), self.code)[index]
        experts = [dequantise(self.planes(e), self.code) for e in range(self.num_experts)]
        return torch.stack(experts)[index]

    def get_shape(self) -> list[int]:
        return list(self.shape if self.num_experts is None else (self.num_experts, *self.shape))

    def get_dtype(self) -> str:
        return "F32"


def matrix_shape(stem: str, tensor: CheckpointTensor) -> tuple[int, int]:
    """The shape of a part that must be a matrix; raises `CheckpointError`."""
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{stem} has a tensor of shape {list(tensor.shape)}, not a matrix.")
    return tensor.shape[0], tensor.shape[1]


def scale_kind(stem: str, tensor: CheckpointTensor, allowed: tuple[str, ...]) -> str:
    """The kind of a scale, by its dtype; raises `UnsupportedModelError` for one not allowed."""
    kind = SCALE_KINDS.get(tensor.dtype_name)
    if kind is None or kind not in allowed:
        raise UnsupportedModelError(
            f"The scales of {stem} are {tensor.dtype_name}; specmoe reads {', '.join(allowed)}."
        )
    return kind


def as_bytes(tensor: Tensor) -> Tensor:
    """8-bit numbers of any dtype as uint8, the same bytes."""
    return tensor.view(torch.uint8)


def group_size(columns: int, groups: int, stem: str) -> int:
    """Columns that share a scale; raises `CheckpointError` if they cannot be counted."""
    if groups < 1 or columns % groups:
        raise CheckpointError(
            f"The {columns} inputs of {stem} cannot be shared among {groups} groups of scales."
        )
    return columns // groups


def unpack_int32(packed: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 [R, C] of eight 4-bit codes -> uint8 [R, C, 8] in the order of columns.

    Args:
        order: the column that each nibble holds, lowest nibble first.
    """
    at = torch.tensor([order.index(column) * 4 for column in range(8)], dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> at) & 0xF).to(torch.uint8)
