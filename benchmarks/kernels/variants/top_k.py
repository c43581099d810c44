"""The launch of `top_k` for a model's router."""

from __future__ import annotations

from benchmarks.kernels.compile_spec import (
    CompileSpec,
    ModelShape,
    Operand,
    count_traffic,
)
from specmoe_compile.kernels.top_k.kernel import block_sizes, top_k_kernel

SCORE_BYTES, PLACE_BYTES = 4, 8


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """One token's experts, of fp32 scores."""
    block_e, block_k = block_sizes(shape.num_experts, shape.top_k)
    score_bytes = shape.num_experts * SCORE_BYTES
    return [
        CompileSpec(
            kernel=top_k_kernel,
            signature={"scores": "*fp32", "values": "*fp32", "places": "*i64"},
            constexprs={
                "E": shape.num_experts,
                "K": shape.top_k,
                "BLOCK_E": block_e,
                "BLOCK_K": block_k,
            },
            num_warps=1,
            num_stages=1,
            grid=(1,),
            label="top_k T=1",
            aligned=("scores", "values", "places"),
            traffic=count_traffic(
                [Operand(distinct_bytes=score_bytes, loaded_bytes=score_bytes)],
                stored_bytes=shape.top_k * (SCORE_BYTES + PLACE_BYTES),
                operations=shape.num_experts * shape.top_k,
            ),
        )
    ]
