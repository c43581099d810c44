"""The launch of `tune_prefetch`, which is the same for every model."""

from __future__ import annotations

from benchmarks.kernels.compile_spec import CompileSpec, ModelShape
from specmoe_compile.kernels.tune_prefetch.kernel import tune_prefetch_kernel


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """Five amounts, with the device's clock."""
    return [
        CompileSpec(
            kernel=tune_prefetch_kernel,
            signature={"state": "*i64", "limit": "*i32", "amounts": "*i32", "now_ptr": "*i64"},
            constexprs={"A": 5, "NOW_GIVEN": False},
            num_warps=1,
            num_stages=1,
            grid=(1,),
            label="tune_prefetch",
            traffic=None,
        )
    ]
