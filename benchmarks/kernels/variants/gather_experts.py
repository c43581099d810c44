"""Launches of `gather_experts` for a model's shape, and what they move from host to device."""

from __future__ import annotations

from benchmarks.kernels.compile_spec import (
    CompileSpec,
    ModelShape,
    Operand,
    Traffic,
    count_traffic,
)
from specmoe_compile.kernels.expert_mlp.config import ceil_div
from specmoe_compile.kernels.gather_experts.kernel import (
    BLOCK,
    MAX_BANKS,
    NUM_WARPS,
    BankLayout,
    gather_constants,
    gather_experts_kernel,
)
from specmoe_compile.kernels.gather_experts.op import DEFAULT_PROGRAMS
from specmoe_compile.runtime.experts.layout import RECORD_ALIGNMENT, TENSOR_ALIGNMENT, align_up

WORD_BYTES = 4


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """One miss of one token, and all of its experts missing: the same compiled kernel."""
    fills = dict.fromkeys((1, shape.top_k))
    return [gather_spec(shape, count) for count in fills]


def record_bytes_of_shape(shape: ModelShape) -> int:
    """Bytes of a record, as `ExpertLayout` lays it out."""
    biases = [shape.up_rows, shape.hidden] if shape.has_bias else []
    sizes = [shape.up_rows * shape.hidden, shape.intermediate * shape.hidden, *biases]
    padded = sum(align_up(size * shape.itemsize, TENSOR_ALIGNMENT) for size in sizes)
    return align_up(padded, RECORD_ALIGNMENT)


def gather_spec(shape: ModelShape, fills: int, *, programs: int = DEFAULT_PROGRAMS) -> CompileSpec:
    """Copy `fills` of the at most K records of one token; one bank."""
    size = record_bytes_of_shape(shape)
    names = [f"{side}{place}" for side in ("source", "destination") for place in range(MAX_BANKS)]
    return CompileSpec(
        kernel=gather_experts_kernel,
        signature={
            **dict.fromkeys(names, "*u8"),
            **dict.fromkeys(("fill_experts", "fill_slots", "fill_count"), "*i32"),
        },
        constexprs=gather_constants([BankLayout(size, size, size, WORD_BYTES)], shape.top_k),
        num_warps=NUM_WARPS,
        num_stages=1,
        grid=(programs,),
        label=f"gather_experts {fills} of {shape.top_k} records",
        aligned=tuple(names),
        traffic=gather_traffic(size, fills, programs),
    )


def gather_traffic(record_bytes: int, fills: int, programs: int) -> Traffic:
    """Bytes read from host memory and written to the device; lists are read from L2 again."""
    tasks = fills * ceil_div(record_bytes, BLOCK * WORD_BYTES)
    records = fills * record_bytes
    return count_traffic(
        [
            Operand(distinct_bytes=records, loaded_bytes=records),
            Operand(distinct_bytes=2 * fills * WORD_BYTES, loaded_bytes=2 * tasks * WORD_BYTES),
            Operand(distinct_bytes=WORD_BYTES, loaded_bytes=programs * WORD_BYTES),
        ],
        stored_bytes=records,
        operations=0,
    )
