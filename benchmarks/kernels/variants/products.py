"""The launches of `products` for a model's attention and router."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kernels.compile_spec import CompileSpec, ModelShape, Operand, count_traffic
from specmoe_compile.kernels.expert_mlp.config import ceil_div
from specmoe_compile.kernels.products.config import products_config
from specmoe_compile.kernels.products.kernel import products_kernel

_POINTERS = ("x", *(f"{name}_{i}" for name in ("weight", "bias", "out") for i in range(4)))


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """q, k and v; o; the router. Of models without known attention the router alone."""
    query, keys = shape.query_heads * shape.head, shape.kv_heads * shape.head
    specs = [_spec(shape, "router", [shape.num_experts], shape.hidden)]
    if query:
        specs.append(_spec(shape, "q, k, v", [query, keys, keys], shape.hidden))
        specs.append(_spec(shape, "o", [shape.hidden], query))
    return specs


def _spec(shape: ModelShape, what: str, outputs: Sequence[int], inputs: int) -> CompileSpec:
    config = products_config(outputs, inputs, shape.itemsize)
    blocks = sum(ceil_div(n, config.block_out) for n in outputs)
    weights, x = sum(outputs) * inputs * shape.itemsize, inputs * shape.itemsize
    biases = sum(outputs) * shape.itemsize if shape.has_bias else 0
    sizes = [*outputs, *[0] * (4 - len(outputs))]
    return CompileSpec(
        kernel=products_kernel,
        signature=dict.fromkeys(_POINTERS, f"*{shape.dtype}"),
        constexprs={
            **{f"N_{i}": size for i, size in enumerate(sizes)},
            "I": inputs,
            "HAS_BIAS": shape.has_bias,
            "BLOCK_OUT": config.block_out,
            "BLOCK_IN": config.block_in,
            "NUM_STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        grid=(blocks,),
        label=f"products T=1, {what}",
        aligned=_POINTERS,
        traffic=count_traffic(
            [
                Operand(distinct_bytes=weights, loaded_bytes=weights),
                Operand(distinct_bytes=x, loaded_bytes=blocks * x),
                Operand(distinct_bytes=biases, loaded_bytes=biases),
            ],
            stored_bytes=sum(outputs) * shape.itemsize,
            operations=2 * sum(outputs) * inputs,
        ),
    )
