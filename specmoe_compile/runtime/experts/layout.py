"""How one expert lies in the expert store and in a cache slot.

A record holds every tensor of one expert of one layer, back to back, each tensor aligned to
`TENSOR_ALIGNMENT` bytes and the whole padded to `RECORD_ALIGNMENT`, so that a fetch is one aligned
copy and the kernel reads the weights where they land.

Shape letters: E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT, ExpertFormat

RECORD_ALIGNMENT = 4096  # bytes; O_DIRECT needs the logical block size, a page covers every disk
TENSOR_ALIGNMENT = 64  # bytes; one cache line, and the 16-byte loads of the kernels


def align_up(size_bytes: int, alignment: int) -> int:
    """Return `size_bytes` rounded up to a multiple of `alignment`."""
    return -(-size_bytes // alignment) * alignment


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of an expert, without the expert dimension.

    `name` is the attribute of the experts module (`gate_up_proj`, `down_proj`, `*_bias`) or a plane
    beside it (`gate_up_proj_scales`, see `formats`), `shape` that of one expert (for example
    [2I, H]), `offset_bytes` its place in the record.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """The record of one expert: tensors in a fixed order, its padded size, what the bytes mean."""

    tensors: tuple[TensorSpec, ...]
    record_bytes: int
    format: ExpertFormat = PLAIN_FORMAT

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        format: ExpertFormat = PLAIN_FORMAT,
    ) -> ExpertLayout:
        """Lay out the tensors of one expert in the order given, `{name: (shape, dtype)}`.

        Raises:
            ValueError: the tensors are not those of the format.
        """
        format.check(shapes)
        specs: list[TensorSpec] = []
        offset = 0
        for name, (shape, dtype) in shapes.items():
            spec = TensorSpec(name=name, shape=tuple(shape), dtype=dtype, offset_bytes=offset)
            specs.append(spec)
            offset = align_up(offset + spec.size_bytes, TENSOR_ALIGNMENT)
        record_bytes = align_up(offset, RECORD_ALIGNMENT)
        return cls(tensors=tuple(specs), record_bytes=record_bytes, format=format)

    @property
    def payload_bytes(self) -> int:
        """Bytes of weights in a record, without padding."""
        return sum(spec.size_bytes for spec in self.tensors)

    @property
    def numbers(self) -> str:
        """What the weights are, for people: "MXFP4", or a dtype such as "bfloat16".

        A replay knows the size of a record only: "unknown".
        """
        if not self.tensors:
            return "unknown"
        return self.format.name or str(self.tensors[0].dtype).removeprefix("torch.")

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of one record as views.

        Args:
            record: [record_bytes] uint8, contiguous, any device.
        """
        return {
            spec.name: record[spec.offset_bytes : spec.offset_bytes + spec.size_bytes]
            .view(spec.dtype)
            .view(spec.shape)
            for spec in self.tensors
        }

    def bank_views(self, bank: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each tensor of every record of a bank as one strided view, [S, *shape].

        Args:
            bank: [S, record_bytes] uint8, contiguous, any device. The views share its memory, with
                a first stride of `record_bytes` in elements of the tensor's dtype.
        """
        slots = bank.shape[0]
        out: dict[str, torch.Tensor] = {}
        for spec in self.tensors:
            flat = bank.view(spec.dtype)
            strides: list[int] = []
            step = 1
            for size in reversed(spec.shape):
                strides.insert(0, step)
                step *= size
            out[spec.name] = flat.as_strided(
                (slots, *spec.shape),
                (self.record_bytes // spec.dtype.itemsize, *strides),
                bank.storage_offset() // spec.dtype.itemsize
                + spec.offset_bytes // spec.dtype.itemsize,
            )
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLayer:
    """One MoE layer of a store: module path, number of experts E, and the record of each."""

    name: str
    num_experts: int
    layout: ExpertLayout

    @property
    def total_bytes(self) -> int:
        return self.num_experts * self.layout.record_bytes
