"""Launches of the weighted sum for a model's shape, and what they move."""

from __future__ import annotations

from benchmarks.kernels.compile_spec import (
    CompileSpec,
    ModelShape,
    Operand,
    Traffic,
    count_traffic,
)
from specmoe_compile.kernels.blend_default_vectors.kernel import block_sizes, weighted_sum_kernel
from specmoe_compile.kernels.expert_mlp.config import ceil_div

PREFILL_TOKENS = 512
ID_BYTES = 8


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """Default vectors of one token, and the sum over K of a prefill."""
    return [weighted_sum_spec(shape, 1, gather=True), weighted_sum_spec(shape, PREFILL_TOKENS)]


def weighted_sum_spec(shape: ModelShape, tokens: int, *, gather: bool = False) -> CompileSpec:
    """Weighted sum of fp32 default vectors by expert id (`gather`), or of outputs in order."""
    itemsize = 4 if gather else shape.itemsize
    block_k, block_h = block_sizes(shape.hidden, shape.top_k, itemsize)
    grid = (tokens, ceil_div(shape.hidden, block_h))
    op = "blend_default_vectors" if gather else "reduce_choices"
    return CompileSpec(
        kernel=weighted_sum_kernel,
        signature={
            "rows": "*fp32" if gather else f"*{shape.dtype}",
            "ids": "*i64" if gather else f"*{shape.dtype}",
            "weights": f"*{shape.dtype}",
            "out": f"*{shape.dtype}",
        },
        constexprs={
            "H": shape.hidden,
            "K": shape.top_k,
            "GATHER": gather,
            "BLOCK_K": block_k,
            "BLOCK_H": block_h,
        },
        num_warps=4,
        num_stages=1,
        grid=grid,
        label=f"{op} T={tokens}",
        aligned=("rows", "ids", "weights", "out"),
        traffic=weighted_sum_traffic(shape, tokens, grid[1], itemsize, gather=gather),
    )


def weighted_sum_traffic(
    shape: ModelShape, tokens: int, blocks: int, itemsize: int, *, gather: bool
) -> Traffic:
    """Bytes and operations; rows of different choices count as different."""
    choices = tokens * shape.top_k
    row_bytes = choices * shape.hidden * itemsize
    routing_bytes = choices * (shape.itemsize + (ID_BYTES if gather else 0))
    return count_traffic(
        [
            Operand(distinct_bytes=row_bytes, loaded_bytes=row_bytes),
            Operand(distinct_bytes=routing_bytes, loaded_bytes=routing_bytes * blocks),
        ],
        stored_bytes=tokens * shape.hidden * shape.itemsize,
        operations=2 * choices * shape.hidden,
    )
