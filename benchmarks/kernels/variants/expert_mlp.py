"""Launches of the decode kernels for a model's shape, and what they move.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate.
"""

from __future__ import annotations

from benchmarks.kernels.compile_spec import (
    CompileSpec,
    ModelShape,
    Operand,
    Traffic,
    count_traffic,
)
from specmoe_compile.kernels.expert_mlp.config import (
    DOWN_FP_FUSION,
    GemvConfig,
    ceil_div,
    down_config,
    gate_up_config,
)
from specmoe_compile.kernels.expert_mlp.kernel import down_kernel, gate_up_kernel
from specmoe_compile.kernels.expert_mlp.launch import down_constexprs, gate_up_constexprs
from specmoe_compile.runtime.experts.form import ExpertForm

SLOT_BYTES = 4
TOKENS = (1, 16)


def form_of_shape(shape: ModelShape) -> ExpertForm:
    """The form of a model's experts."""
    return ExpertForm(
        has_gate=shape.has_gate,
        interleaved=shape.interleaved,
        transposed=shape.transposed,
        activation=shape.activation,
        alpha=shape.alpha,
        limit=shape.limit,
        format=shape.format,
    )


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """Both launches of `run_experts_decode`, for one token and for 16."""
    specs = []
    for tokens in TOKENS:
        specs.append(gate_up_spec(shape, tokens))
        specs.append(down_spec(shape, tokens))
    return specs


def gate_up_spec(shape: ModelShape, tokens: int, *, op: str = "run_experts_decode") -> CompileSpec:
    """The up projection of T tokens, all of whose choices have a slot."""
    config = gate_up_config(
        shape.hidden,
        shape.itemsize,
        has_gate=shape.has_gate,
        transposed=shape.transposed,
    )
    weights = f"*{shape.dtype}"
    return CompileSpec(
        kernel=gate_up_kernel,
        signature={
            "x": weights,
            "slots": "*i32",
            "up": weights,
            "up_bias": weights,
            "intermediate": weights,
            "up_stride": "i32",
            "bias_stride": "i32",
            "alpha": "fp32",
            "limit": "fp32",
        },
        constexprs=gate_up_constexprs(
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
        label=f"{op} gate_up T={tokens}",
        aligned=("x", "up", "up_bias", "intermediate", "up_stride", "bias_stride"),
        traffic=gate_up_traffic(shape, config, tokens),
    )


def distinct_choices(shape: ModelShape, tokens: int) -> int:
    """Experts that T tokens use if they are spread evenly: as many as there can be."""
    return min(shape.num_experts, tokens * shape.top_k)


def gate_up_traffic(shape: ModelShape, config: GemvConfig, tokens: int) -> Traffic:
    """Bytes and operations of the up projection.

    Tokens that share an expert are neighbours in the grid, and x is small: repeats come from L2.
    """
    choices = tokens * shape.top_k
    programs = choices * ceil_div(shape.intermediate, config.block_out)
    rows = shape.up_rows
    expert_bytes = shape.up_bytes
    x_bytes = shape.hidden * shape.itemsize
    return count_traffic(
        [
            Operand(
                distinct_bytes=distinct_choices(shape, tokens) * expert_bytes,
                loaded_bytes=choices * expert_bytes,
            ),
            Operand(distinct_bytes=tokens * x_bytes, loaded_bytes=programs * x_bytes),
            Operand(distinct_bytes=choices * SLOT_BYTES, loaded_bytes=programs * SLOT_BYTES),
        ],
        stored_bytes=choices * shape.intermediate * shape.itemsize,
        operations=2 * choices * rows * shape.hidden,
    )


def down_spec(
    shape: ModelShape, tokens: int, *, op: str = "run_experts_decode", late: int | None = None
) -> CompileSpec:
    """The down projection of T tokens with `late` of K choices computed now, all of them if None.

    The other choices are read from an earlier launch's outputs.
    """
    config = down_config(
        shape.intermediate, shape.top_k, shape.itemsize, transposed=shape.transposed
    )
    weights = f"*{shape.dtype}"
    return CompileSpec(
        kernel=down_kernel,
        fp_fusion=DOWN_FP_FUSION,
        signature={
            "intermediate": weights,
            "slots": "*i32",
            "weights": weights,
            "down": weights,
            "down_bias": weights,
            "partial": weights,
            "skipped": "*i32",
            "default_vectors": "*fp32",
            "y": weights,
            "out": weights,
            "down_stride": "i32",
            "bias_stride": "i32",
            "read_partial": "i32",
            "read_skipped": "i32",
            "store_y": "i32",
        },
        constexprs=down_constexprs(
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
        label=f"{op} down T={tokens}",
        aligned=("intermediate", "down", "down_bias", "down_stride", "bias_stride"),
        traffic=down_traffic(shape, config, tokens, shape.top_k if late is None else late),
    )


def down_traffic(shape: ModelShape, config: GemvConfig, tokens: int, late: int) -> Traffic:
    """Bytes and operations of the down projection with `late` of K choices computed now."""
    choices = tokens * late
    programs = tokens * ceil_div(shape.hidden, config.block_out)
    expert_bytes = shape.down_bytes
    token_bytes = late * shape.intermediate * shape.itemsize
    earlier_bytes = tokens * (shape.top_k - late) * shape.hidden * shape.itemsize
    routing_bytes = shape.top_k * (SLOT_BYTES + shape.itemsize)
    # Slots are read before the products and after; transposed, once more before the first.
    more_reads = 2 if shape.transposed and late else 1
    read_routing_bytes = routing_bytes + more_reads * shape.top_k * SLOT_BYTES
    return count_traffic(
        [
            Operand(
                distinct_bytes=min(shape.num_experts, choices) * expert_bytes,
                loaded_bytes=choices * expert_bytes,
            ),
            Operand(distinct_bytes=tokens * token_bytes, loaded_bytes=programs * token_bytes),
            Operand(distinct_bytes=earlier_bytes, loaded_bytes=earlier_bytes),
            Operand(
                distinct_bytes=tokens * routing_bytes, loaded_bytes=programs * read_routing_bytes
            ),
        ],
        stored_bytes=tokens * shape.hidden * shape.itemsize,
        operations=2 * choices * shape.hidden * shape.intermediate
        + 2 * tokens * shape.top_k * shape.hidden,
    )
