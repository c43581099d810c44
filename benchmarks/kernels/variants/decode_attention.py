"""Launches of `decode_attention` for one token of a model, its cache full."""

from __future__ import annotations

import triton

from benchmarks.kernels.compile_spec import (
    CompileSpec,
    ModelShape,
    Operand,
    Traffic,
    count_traffic,
)
from specmoe_compile.kernels.decode_attention.config import (
    AttentionConfig,
    attention_config,
    parts_block,
)
from specmoe_compile.kernels.decode_attention.kernel import (
    attended_range_kernel,
    decode_attention_kernel,
    sum_parts_kernel,
)

LENGTHS = (1024, 65536)
PROCESSORS = 132
"""Of an H100 or H200; another number gives other parts, and the same compiled code otherwise."""
_FLOAT_BYTES = 4
_STRIDES = ("q_b", "q_h", "q_q", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s")
_MASK_STRIDES = ("mask_b", "mask_h", "mask_q", "bounds_b")
_OUT_STRIDES = ("out_b", "out_h", "out_q")


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """The range of a mask, and one layer's attention at each of `LENGTHS`."""
    if not shape.query_heads:
        return []
    specs = [_range_spec(max(LENGTHS))]
    for length in LENGTHS:
        config = attention_config(
            groups=shape.kv_heads,
            rows=shape.query_heads // shape.kv_heads,
            length=length,
            head=shape.head,
            itemsize=shape.itemsize,
            processors=PROCESSORS,
        )
        specs.append(_attention_spec(shape, length, config))
        specs.append(_sum_spec(shape, length, config))
    return specs


def _range_spec(length: int) -> CompileSpec:
    block = 16384
    return CompileSpec(
        kernel=attended_range_kernel,
        signature={
            "mask": "*u8",
            "bounds": "*i32",
            **dict.fromkeys(("stride_b", "stride_h", "stride_q", "S"), "i32"),
            "lowest": "fp32",
        },
        constexprs={"H": 1, "Q": 1, "IS_BOOL": True, "BLOCK": block},
        num_warps=16,
        num_stages=3,
        grid=(1,),
        label=f"attended_range S={length}",
        aligned=("mask", "bounds", "S"),
        traffic=count_traffic(
            [Operand(distinct_bytes=length, loaded_bytes=length)],
            stored_bytes=8,
            operations=2 * length,
        ),
    )


def _constexprs(shape: ModelShape) -> dict[str, object]:
    return {
        "Q": 1,
        "D": shape.head,
        "HAS_SINKS": shape.sinks,
        "BLOCK_D": max(16, triton.next_power_of_2(shape.head)),
    }


def _attention_spec(shape: ModelShape, length: int, config: AttentionConfig) -> CompileSpec:
    pointer = f"*{shape.dtype}"
    return CompileSpec(
        kernel=decode_attention_kernel,
        signature={
            **dict.fromkeys(("q", "k", "v", "sinks", "out"), pointer),
            "mask": "*u8",
            "bounds": "*i32",
            **dict.fromkeys(("part_out", "part_max", "part_sum"), "*fp32"),
            "scale": "fp32",
            **dict.fromkeys((*_STRIDES, *_MASK_STRIDES, *_OUT_STRIDES, "parts"), "i32"),
        },
        constexprs={
            **_constexprs(shape),
            "BLOCK_N": config.block_n,
            "SPLIT": config.parts > 1,
            "G": shape.kv_heads,
            "REPEATS": shape.query_heads // shape.kv_heads,
            "MASK_IS_BOOL": True,
            "MASK_PER_ROW": False,
            "BLOCK_M": config.block_m,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        grid=(config.parts, shape.kv_heads),
        label=f"decode_attention B=1 S={length}",
        aligned=("q", "k", "v", "mask", "bounds", "out", "part_out", *_STRIDES, *_OUT_STRIDES),
        traffic=_attention_traffic(shape, length, config),
    )


def _attention_traffic(shape: ModelShape, length: int, config: AttentionConfig) -> Traffic:
    heads, head = shape.query_heads, shape.head
    cache_bytes = 2 * shape.kv_heads * length * head * shape.itemsize
    query_bytes = heads * head * shape.itemsize
    programs = config.parts * shape.kv_heads
    operands = [
        Operand(distinct_bytes=cache_bytes, loaded_bytes=cache_bytes),
        Operand(distinct_bytes=query_bytes, loaded_bytes=query_bytes * config.parts),
        Operand(distinct_bytes=length, loaded_bytes=length * shape.kv_heads),
        Operand(distinct_bytes=8, loaded_bytes=8 * programs),
    ]
    return count_traffic(
        operands,
        stored_bytes=heads * config.parts * (head + 2) * _FLOAT_BYTES,
        operations=4 * heads * length * head,
    )


def _sum_spec(shape: ModelShape, length: int, config: AttentionConfig) -> CompileSpec:
    heads = shape.query_heads
    part_bytes = heads * config.parts * (shape.head + 2) * _FLOAT_BYTES
    return CompileSpec(
        kernel=sum_parts_kernel,
        signature={
            **dict.fromkeys(("part_out", "part_max", "part_sum"), "*fp32"),
            **dict.fromkeys(("sinks", "out"), f"*{shape.dtype}"),
            **dict.fromkeys((*_OUT_STRIDES, "parts"), "i32"),
        },
        constexprs={
            **_constexprs(shape),
            "N": heads,
            "BLOCK_P": parts_block(config.parts),
        },
        num_warps=4,
        num_stages=3,
        grid=(heads,),
        label=f"sum_parts B=1 S={length}",
        aligned=("part_out", "out", *_OUT_STRIDES),
        traffic=count_traffic(
            [Operand(distinct_bytes=part_bytes, loaded_bytes=part_bytes)],
            stored_bytes=heads * shape.head * shape.itemsize,
            operations=2 * heads * config.parts * shape.head,
        ),
    )
