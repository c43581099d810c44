"""The launch of `plan_cache` for a model's shape, and what it moves.

Shape letters: C = T * K choices, E experts, S slots.
"""

from __future__ import annotations

import triton

from benchmarks.kernels.compile_spec import (
    CompileSpec,
    ModelShape,
    Operand,
    Traffic,
    count_traffic,
)
from specmoe_compile.kernels.plan_cache.kernel import block_sizes, plan_cache_kernel
from specmoe_compile.kernels.plan_cache.op import COUNTERS, MAX_CHOICES

_INT32 = ("slot_of", "expert_of", "pending", "unused")
_INT64 = ("ids", "last_use", "scores", "clock", "regret", "counters")
_OUTPUTS = ("present", "late", "fill_experts", "fill_slots", "fill_count", "fill_limit")
ID_BYTES, WORD_BYTES, LONG_BYTES = 8, 4, 8
_HIT_COUNTERS = 2  # steps and hits


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """One token and a batch of 16, by each policy; a quarter of the experts have slots."""
    specs = [plan_spec(shape, 1, policy=policy) for policy in ("lru", "lfu", "adaptive")]
    specs.append(plan_spec(shape, 1, policy="adaptive", spare=shape.top_k))
    specs.append(plan_spec(shape, 1, policy="adaptive", speculative=True))
    if 16 * shape.top_k <= 256:
        specs.append(plan_spec(shape, 16, policy="adaptive"))
    return specs


def slots_of_shape(shape: ModelShape, tokens: int = 1) -> int:
    """S: a quarter of the experts, at least as many as a step may use."""
    return max(min(tokens * shape.top_k, shape.num_experts), shape.num_experts // 4)


def plan_spec(
    shape: ModelShape, tokens: int, *, policy: str, speculative: bool = False, spare: int = 0
) -> CompileSpec:
    """A plan of one layer; bytes are counted for one token by LRU whose experts are all there."""
    choices, slots = tokens * shape.top_k, slots_of_shape(shape, tokens)
    ranked = 0 if policy == "lru" else shape.num_experts
    block_c, chunk, block_s, num_warps = block_sizes(choices, slots, ranked)
    counted = tokens == 1 and policy == "lru" and not speculative
    kind = "prefetch" if speculative else policy + (f" spare={spare}" if spare else "")
    return CompileSpec(
        kernel=plan_cache_kernel,
        signature={
            **dict.fromkeys(_INT32, "*i32"),
            **dict.fromkeys(_INT64, "*i64"),
            **dict.fromkeys(_OUTPUTS, "*i32"),
            "spare_from": "i32",
        },
        constexprs={
            "CHOICES": choices,
            "E": shape.num_experts,
            "S": slots,
            "COUNTERS": len(COUNTERS),
            "SCORED": policy != "lru",
            "ADAPTIVE": policy == "adaptive",
            "SPECULATIVE": speculative,
            "MAX_FILLS": MAX_CHOICES,
            "LIMITED": speculative,
            "SPARE": spare,
            "BLOCK_C": block_c,
            "CHUNK": chunk,
            "BLOCK_S": block_s,
            "BLOCK_E": triton.next_power_of_2(shape.num_experts),
        },
        num_warps=num_warps,
        num_stages=1,
        grid=(1,),
        label=f"plan_cache {kind} T={tokens}",
        traffic=hits_traffic(choices, shape.num_experts, slots) if counted else None,
    )


def hits_traffic(choices: int, experts: int, slots: int) -> Traffic:
    """Bytes of a step, of at most 16 choices of different experts, that all are there."""
    looked_up = choices * (ID_BYTES + WORD_BYTES)
    tables = slots * (3 * WORD_BYTES + LONG_BYTES) + (1 + len(COUNTERS)) * LONG_BYTES
    fills = min(choices, experts)
    results = (2 * choices + 2 * fills + 1) * WORD_BYTES
    updates = choices * LONG_BYTES + (1 + _HIT_COUNTERS) * LONG_BYTES
    return count_traffic(
        [
            Operand(distinct_bytes=looked_up, loaded_bytes=looked_up),
            # `pending` is read by slot, and once more by choice.
            Operand(distinct_bytes=tables, loaded_bytes=tables + choices * WORD_BYTES),
        ],
        stored_bytes=results + updates,
        operations=0,
    )
