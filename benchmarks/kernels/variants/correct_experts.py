"""Launches of `correct_experts` for a model's shape; the compiled kernels are those of decode."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.kernels.compile_spec import CompileSpec, ModelShape
from benchmarks.kernels.variants.expert_mlp import (
    SLOT_BYTES,
    down_spec,
    gate_up_spec,
    gate_up_traffic,
)
from specmoe_compile.kernels.expert_mlp.config import gate_up_config


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """One token, one expert of which arrived late."""
    gate_up = gate_up_spec(shape, 1, op="correct_experts")
    config = gate_up_config(
        shape.hidden,
        shape.itemsize,
        has_gate=shape.has_gate,
        transposed=shape.transposed,
    )
    # Programs of choices that are not late read their slot and end.
    traffic = gate_up_traffic(replace(shape, top_k=1), config, 1)
    idle = (shape.top_k - 1) * SLOT_BYTES
    traffic = replace(
        traffic,
        needed_bytes=traffic.needed_bytes + idle,
        moved_bytes=traffic.moved_bytes + idle,
        reread_bytes=traffic.reread_bytes + idle * (gate_up.grid[1] - 1),
    )
    return [
        replace(gate_up, traffic=traffic, label="correct_experts gate_up T=1, 1 late"),
        replace(
            down_spec(shape, 1, op="correct_experts", late=1),
            label="correct_experts down T=1, 1 late",
        ),
    ]
