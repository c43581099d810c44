"""Launches of the grouped kernels for a model's shape, and what they move.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate, N = T * K choices.
"""

from __future__ import annotations

from benchmarks.kernels.compile_spec import (
    CompileSpec,
    ModelShape,
    Operand,
    Traffic,
    count_traffic,
)
from benchmarks.kernels.variants.expert_mlp import form_of_shape
from specmoe_compile.kernels.expert_mlp.config import ceil_div
from specmoe_compile.kernels.grouped_experts.config import (
    GroupedConfig,
    block_m,
    down_config,
    gate_up_config,
)
from specmoe_compile.kernels.grouped_experts.kernel import (
    grouped_down_kernel,
    grouped_gate_up_kernel,
)
from specmoe_compile.kernels.grouped_experts.launch import (
    down_constexprs,
    gate_up_constexprs,
    scale_constexprs,
)
from specmoe_compile.kernels.grouped_experts.plan import max_tiles

TOKENS = (64, 512, 4096)
# From about this many on, each weight is used by so many tokens that arithmetic is the bound.
ARITHMETIC_BOUND_TOKENS = 4096
ORDER_BYTES = 8
TILE_BYTES = 4  # of each of the five columns of `TilePlan`; three say that a tile is not needed


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """Both launches of `run_grouped_experts_` for a short, a middling and a long prompt."""
    specs = []
    for tokens in TOKENS:
        rows = block_m(tokens * shape.top_k, shape.num_experts, shape.itemsize)
        specs.append(gate_up_spec(shape, tokens, rows))
        specs.append(down_spec(shape, tokens, rows))
    return specs


def _plan_signature() -> dict[str, str]:
    names = ("tile_slot", "tile_start", "tile_end", "tile_first", "tile_count")
    return {"order": "*i64", **dict.fromkeys(names, "*i32")}


def gate_up_spec(shape: ModelShape, tokens: int, rows: int) -> CompileSpec:
    """The up projection for tiles of `rows` choices."""
    config = gate_up_config(rows, shape.itemsize, has_gate=shape.has_gate)
    tiles = max_tiles(tokens * shape.top_k, shape.num_experts, rows)
    blocks = ceil_div(shape.intermediate, config.block_n)
    weights = f"*{shape.dtype}"
    return CompileSpec(
        kernel=grouped_gate_up_kernel,
        signature={
            "x": weights,
            **_plan_signature(),
            "up": weights,
            "up_bias": weights,
            "up_scales": weights,
            "intermediate": weights,
            "up_stride": "i32",
            "bias_stride": "i32",
            "scale_stride": "i32",
            "alpha": "fp32",
            "limit": "fp32",
        },
        constexprs={
            **gate_up_constexprs(
                shape.hidden,
                shape.intermediate,
                shape.top_k,
                form_of_shape(shape),
                config,
                has_bias=shape.has_bias,
            ),
            **scale_constexprs(None),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        grid=(tiles * blocks,),
        label=f"run_grouped_experts gate_up T={tokens}",
        aligned=(
            "x",
            *_plan_signature(),
            "up",
            "up_bias",
            "up_scales",
            "intermediate",
            "up_stride",
            "bias_stride",
            "scale_stride",
        ),
        traffic=gate_up_traffic(shape, config, tokens, blocks)
        if tokens < ARITHMETIC_BOUND_TOKENS
        else None,
    )


def down_spec(shape: ModelShape, tokens: int, rows: int) -> CompileSpec:
    """The down projection for tiles of `rows` choices."""
    config = down_config(rows, shape.itemsize)
    tiles = max_tiles(tokens * shape.top_k, shape.num_experts, rows)
    blocks = ceil_div(shape.hidden, config.block_n)
    weights = f"*{shape.dtype}"
    return CompileSpec(
        kernel=grouped_down_kernel,
        signature={
            "intermediate": weights,
            **_plan_signature(),
            "down": weights,
            "down_bias": weights,
            "down_scales": weights,
            "y": weights,
            "down_stride": "i32",
            "bias_stride": "i32",
            "scale_stride": "i32",
        },
        constexprs={
            **down_constexprs(
                shape.hidden,
                shape.intermediate,
                form_of_shape(shape),
                config,
                has_bias=shape.has_bias,
            ),
            **scale_constexprs(None),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        grid=(tiles * blocks,),
        label=f"run_grouped_experts down T={tokens}",
        aligned=(
            "intermediate",
            *_plan_signature(),
            "down",
            "down_bias",
            "down_scales",
            "y",
            "down_stride",
            "bias_stride",
            "scale_stride",
        ),
        traffic=down_traffic(shape, config, tokens, blocks)
        if tokens < ARITHMETIC_BOUND_TOKENS
        else None,
    )


def even_counts(shape: ModelShape, tokens: int) -> list[int]:
    """Choices of each expert if they are spread as evenly as can be."""
    share, rest = divmod(tokens * shape.top_k, shape.num_experts)
    return [share + 1] * rest + [share] * (shape.num_experts - rest)


def _common_operands(
    shape: ModelShape, config: GroupedConfig, tokens: int, blocks: int, expert_bytes: int
) -> list[Operand]:
    """Weights and plan. Programs run slot by slot: repeats within a slot come from L2."""
    counts = [count for count in even_counts(shape, tokens) if count]
    tiles = sum(ceil_div(count, config.block_m) for count in counts)
    unneeded = max_tiles(sum(counts), shape.num_experts, config.block_m) - tiles
    choices = sum(counts)
    return [
        Operand(distinct_bytes=len(counts) * expert_bytes, loaded_bytes=tiles * expert_bytes),
        Operand(distinct_bytes=choices * ORDER_BYTES, loaded_bytes=choices * ORDER_BYTES * blocks),
        Operand(
            distinct_bytes=(5 * tiles + 3 * unneeded) * TILE_BYTES,
            loaded_bytes=(tiles + unneeded) * blocks * 5 * TILE_BYTES,
        ),
    ]


def gate_up_traffic(shape: ModelShape, config: GroupedConfig, tokens: int, blocks: int) -> Traffic:
    """Bytes and operations of the grouped up projection of T tokens, evenly spread.

    A token's row is gathered by each of its K experts; x as a whole stays in L2.
    """
    choices = tokens * shape.top_k
    rows = shape.up_rows
    expert_bytes = (rows * shape.hidden + (rows if shape.has_bias else 0)) * shape.itemsize
    x_bytes = shape.hidden * shape.itemsize
    operands = _common_operands(shape, config, tokens, blocks, expert_bytes)
    operands.append(
        Operand(distinct_bytes=tokens * x_bytes, loaded_bytes=choices * x_bytes * blocks)
    )
    return count_traffic(
        operands,
        stored_bytes=choices * shape.intermediate * shape.itemsize,
        operations=2 * choices * rows * shape.hidden,
    )


def down_traffic(shape: ModelShape, config: GroupedConfig, tokens: int, blocks: int) -> Traffic:
    """Bytes and operations of the grouped down projection of T tokens, evenly spread."""
    choices = tokens * shape.top_k
    biases = shape.hidden if shape.has_bias else 0
    expert_bytes = (shape.hidden * shape.intermediate + biases) * shape.itemsize
    input_bytes = choices * shape.intermediate * shape.itemsize
    operands = _common_operands(shape, config, tokens, blocks, expert_bytes)
    operands.append(Operand(distinct_bytes=input_bytes, loaded_bytes=input_bytes * blocks))
    return count_traffic(
        operands,
        stored_bytes=choices * shape.hidden * shape.itemsize,
        operations=2 * choices * shape.hidden * shape.intermediate,
    )
