"""Launches for coded experts of a model's shape: decode, and expanding matrices for prefill.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate.
"""

from __future__ import annotations

import torch

from benchmarks.kernels.compile_spec import CompileSpec, ModelShape
from benchmarks.kernels.variants.expert_mlp import (
    TOKENS,
    down_traffic,
    form_of_shape,
    gate_up_traffic,
)
from specmoe_compile.kernels.expert_mlp.config import DOWN_FP_FUSION, ceil_div
from specmoe_compile.kernels.packed_experts import expand
from specmoe_compile.kernels.packed_experts.config import (
    down_config,
    gate_up_config,
    up_fuses,
)
from specmoe_compile.kernels.packed_experts.kernel import packed_down_kernel, packed_gate_up_kernel
from specmoe_compile.kernels.packed_experts.launch import (
    packed_down_constexprs,
    packed_gate_up_constexprs,
)
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode

_SCALES = {"e8m0": "*u8", "e4m3": "*u8", "f32": "*fp32", "bf16": "*bf16", "f16": "*fp16"}
_STRIDES = ("code_stride", "scale_stride", "zero_stride", "factor_stride", "bias_stride")
_PLANES = ("codes", "scales", "zeros", "factors")


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """Both launches of `run_experts_decode`, and what expands matrices for prefill."""
    specs = []
    for tokens in TOKENS:
        specs += [gate_up_spec(shape, tokens), down_spec(shape, tokens)]
    specs.append(expand_spec(shape))
    return specs


def _plane_signature(code: WeightCode) -> dict[str, str]:
    assert code.scale is not None, "coded weights have scales"
    return {"codes": "*i32", "scales": _SCALES[code.scale], "zeros": "*u8", "factors": "*fp32"}


def gate_up_spec(shape: ModelShape, tokens: int) -> CompileSpec:
    """The up projection of T tokens, all of whose choices have a slot."""
    code = shape.format.up
    config = gate_up_config(shape.hidden, code, has_gate=shape.has_gate)
    numbers = f"*{shape.dtype}"
    return CompileSpec(
        kernel=packed_gate_up_kernel,
        fp_fusion=up_fuses(config, code, has_gate=shape.has_gate),
        signature={
            "x": numbers,
            "slots": "*i32",
            **_plane_signature(code),
            "up_bias": numbers,
            "table": "*fp32",
            "intermediate": numbers,
            **dict.fromkeys(_STRIDES, "i32"),
            "alpha": "fp32",
            "limit": "fp32",
        },
        constexprs=packed_gate_up_constexprs(
            shape.hidden,
            shape.intermediate,
            shape.top_k,
            form_of_shape(shape),
            config,
            has_bias=shape.has_bias,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        grid=(tokens * shape.top_k, ceil_div(shape.intermediate, config.block_out)),
        label=f"run_experts_decode coded gate_up T={tokens}",
        aligned=("x", *_PLANES, "up_bias", "intermediate", *_STRIDES),
        traffic=gate_up_traffic(shape, config, tokens),
    )


def down_spec(shape: ModelShape, tokens: int) -> CompileSpec:
    """The down projection of T tokens with all choices computed now."""
    code = shape.format.down
    config = down_config(shape.intermediate, shape.top_k, code)
    numbers = f"*{shape.dtype}"
    return CompileSpec(
        kernel=packed_down_kernel,
        fp_fusion=DOWN_FP_FUSION,
        signature={
            "intermediate": numbers,
            "slots": "*i32",
            "weights": numbers,
            **_plane_signature(code),
            "down_bias": numbers,
            "table": "*fp32",
            "partial": numbers,
            "skipped": "*i32",
            "default_vectors": "*fp32",
            "y": numbers,
            "out": numbers,
            **dict.fromkeys(_STRIDES, "i32"),
            **dict.fromkeys(("read_partial", "read_skipped", "store_y"), "i32"),
        },
        constexprs=packed_down_constexprs(
            shape.hidden,
            shape.intermediate,
            shape.top_k,
            form_of_shape(shape),
            config,
            has_bias=shape.has_bias,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        grid=(tokens, ceil_div(shape.hidden, config.block_out)),
        label=f"run_experts_decode coded down T={tokens}",
        aligned=("intermediate", *_PLANES, "down_bias", *_STRIDES),
        traffic=down_traffic(shape, config, tokens, shape.top_k),
    )


def expand_spec(shape: ModelShape) -> CompileSpec:
    """The up projections of all experts as matrices of the model's dtype."""
    code, dtype = shape.format.up, {"bf16": torch.bfloat16, "fp16": torch.float16}[shape.dtype]
    dtype = expand.matrix_dtype(code, dtype)
    blocks = (
        ceil_div(shape.up_rows, expand.BLOCK_OUT),
        ceil_div(shape.hidden, expand.BLOCK_IN),
    )
    return CompileSpec(
        kernel=expand.expand_kernel,
        fp_fusion=False,
        signature={
            **_plane_signature(code),
            "table": "*fp32",
            "used": "*i32",
            "matrix": "*fp32" if dtype == torch.float32 else f"*{shape.dtype}",
            **dict.fromkeys(_STRIDES[:4], "i32"),
        },
        constexprs=expand.expand_constexprs(shape.up_rows, shape.hidden, code, dtype),
        num_warps=expand.NUM_WARPS,
        num_stages=3,
        grid=(shape.num_experts, *blocks),
        label="run_grouped_experts expand",
        aligned=(*_PLANES, "matrix", *_STRIDES[:4]),
        traffic=None,
    )
