"""How a kernel says what is compiled for a model, and what its launch moves.

Each `variants/<kernel>.py` exposes `compile_specs(shape: ModelShape) -> list[CompileSpec]`: the
launches of that kernel at its default configuration for a model's shape.
`benchmarks/kernels/resources` compiles each for every target without a GPU and writes registers,
shared memory, spills, bytes and operations to docs/results/log/kernels.md.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT, ExpertFormat
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The MoE layer of a model, and its attention. `dtype` is Triton's name of the weights' dtype.

    Attributes:
        query_heads, kv_heads, head: attention heads, heads of keys, head size; no heads where the
            model's attention is not one that `decode_attention` computes.
        sinks: whether each head has a sink.
        format: of the experts' weights.
    """

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    dtype: str = "bf16"
    has_gate: bool = True
    has_bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = float("inf")
    query_heads: int = 0
    kv_heads: int = 0
    head: int = 0
    sinks: bool = False
    format: ExpertFormat = PLAIN_FORMAT

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return {"fp32": 4, "bf16": 2, "fp16": 2}[self.dtype]

    @property
    def up_rows(self) -> int:
        """Outputs of the up projection: 2I with a gate, else I."""
        return self.intermediate * (2 if self.has_gate else 1)

    @property
    def up_bytes(self) -> int:
        """Bytes of one expert's up projection with its planes and bias, without padding."""
        return self._weight_bytes(self.format.up, self.up_rows, self.hidden)

    @property
    def down_bytes(self) -> int:
        """Bytes of one expert's down projection with its planes and bias, without padding."""
        return self._weight_bytes(self.format.down, self.hidden, self.intermediate)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, without padding."""
        return self.up_bytes + self.down_bytes

    def _weight_bytes(self, code: WeightCode, outputs: int, inputs: int) -> int:
        bias = outputs * self.itemsize if self.has_bias else 0
        if code.is_plain:
            return outputs * inputs * self.itemsize + bias
        planes = code.plane_shapes("w", outputs, inputs, torch.bfloat16).values()
        return bias + sum(prod(shape) * dtype.itemsize for shape, dtype in planes)


MODEL_SHAPES: tuple[ModelShape, ...] = (
    ModelShape(
        name="Qwen3-30B-A3B",
        hidden=2048,
        intermediate=768,
        num_experts=128,
        top_k=8,
        query_heads=32,
        kv_heads=4,
        head=128,
    ),
    ModelShape(
        name="GPT-OSS-20B",
        hidden=2880,
        intermediate=2880,
        num_experts=32,
        top_k=4,
        has_bias=True,
        interleaved=True,
        transposed=True,
        activation="swiglu_oai",
        alpha=1.702,
        limit=7.0,
        query_heads=64,
        kv_heads=8,
        head=64,
        sinks=True,
    ),
    ModelShape(
        name="Mixtral-8x7B",
        hidden=4096,
        intermediate=14336,
        num_experts=8,
        top_k=2,
        query_heads=32,
        kv_heads=8,
        head=128,
    ),
    ModelShape(name="DeepSeek-V2-Lite", hidden=2048, intermediate=1408, num_experts=64, top_k=6),
)


def _coded(name: str, suffix: str, code: WeightCode) -> ModelShape:
    """A model of `MODEL_SHAPES` with coded experts, which are never transposed."""
    shape = next(one for one in MODEL_SHAPES if one.name == name)
    return replace(
        shape,
        name=f"{name} {suffix}",
        transposed=False,
        format=ExpertFormat(up=code, down=code),
    )


MXFP4 = WeightCode(book="e2m1", block=(1, 32), scale="e8m0")
NVFP4 = WeightCode(book="e2m1", block=(1, 16), scale="e4m3", has_global=True)
FP8 = WeightCode(book="e4m3", block=(128, 128), scale="f32")
INT4 = WeightCode(book="int4", block=(1, 128), scale="bf16")
NF4 = WeightCode(book="nf4", block=(1, 64), scale="f32")
INT8 = WeightCode(book="int8", block=(1, 0), scale="f32")

PACKED_SHAPES: tuple[ModelShape, ...] = (
    _coded("Qwen3-30B-A3B", "nvfp4", NVFP4),
    _coded("Qwen3-30B-A3B", "fp8", FP8),
    _coded("Qwen3-30B-A3B", "int4", INT4),
    _coded("Qwen3-30B-A3B", "nf4", NF4),
    _coded("Qwen3-30B-A3B", "int8", INT8),
    _coded("GPT-OSS-20B", "mxfp4", MXFP4),
    *(
        ModelShape(
            name=f"DeepSeek-V3 {suffix}",
            hidden=7168,
            intermediate=2048,
            num_experts=256,
            top_k=8,
            format=ExpertFormat(up=code, down=code),
        )
        for suffix, code in (("fp8", FP8), ("nvfp4", NVFP4))
    ),
)
"""Shapes whose experts are coded; of these only what differs from plain experts is compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one launch must move and does move, counted from its grid, in bytes.

    Attributes:
        needed_bytes: every input byte that the result depends on read once, every output byte
            written once.
        moved_bytes: what the launch's loads and stores move between device memory and the chip:
            masked-out lanes do not count, and an operand that several programs read counts once per
            launch only if it is small enough to stay in L2 (then its repeats are `reread_bytes`).
        reread_bytes: repeated loads that L2 serves.
        operations: floating-point multiplies and adds.
    """

    needed_bytes: int
    moved_bytes: int
    reread_bytes: int = 0
    operations: int = 0

    @property
    def excess(self) -> float:
        """Share of the moved bytes beyond what is needed; 0.0 is perfect."""
        return self.moved_bytes / self.needed_bytes - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSpec:
    """One launch: a `triton.jit` function with all that its compilation depends on.

    Attributes:
        kernel: the `triton.jit` function.
        signature: Triton type of each argument that is not a constexpr, by name ("*bf16", "i32").
        constexprs: value of each constexpr, by name.
        num_warps: warps of one program.
        num_stages: software pipeline depth.
        grid: programs on each axis.
        label: "op kernel T=1", unique within a model.
        aligned: arguments that are multiples of 16 (pointers, in bytes), which Triton learns from
            the arguments of a real launch.
        fp_fusion: whether a product and a sum may become one operation.
        traffic: see `Traffic`; None for launches that arithmetic bounds, not bytes.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    label: str
    traffic: Traffic | None
    aligned: tuple[str, ...] = field(default=())
    fp_fusion: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """What a launch loads of one argument.

    Attributes:
        distinct_bytes: different bytes that are loaded.
        loaded_bytes: bytes that all programs load together.
        cached: repeats come from L2, because the operand is small or because the programs that
            share a part of it run next to each other.
    """

    distinct_bytes: int
    loaded_bytes: int
    cached: bool = True


def count_traffic(operands: Sequence[Operand], *, stored_bytes: int, operations: int) -> Traffic:
    """Add up what a launch loads and stores; every byte is stored once."""
    distinct = sum(operand.distinct_bytes for operand in operands)
    repeated = [operand.loaded_bytes - operand.distinct_bytes for operand in operands]
    from_memory = sum(
        repeats for operand, repeats in zip(operands, repeated, strict=True) if not operand.cached
    )
    return Traffic(
        needed_bytes=distinct + stored_bytes,
        moved_bytes=distinct + from_memory + stored_bytes,
        reread_bytes=sum(repeated) - from_memory,
        operations=operations,
    )
