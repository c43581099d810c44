"""Block sizes of the decode kernels: a fixed rule per shape, so that nothing is tuned while a CUDA
graph is captured. No Triton in here.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specmoe_compile.runtime.experts.form import ExpertForm

# One 16-byte load of every lane of a warp, in bytes: the least that a row is read by.
WARP_LOAD_BYTES = 32 * 16
# Weights of one pipeline stage, in bytes: four loads of 16 bytes for each of 128 threads.
_STAGE_BYTES = 8192
DOWN_FP_FUSION = False
"""The sum over K crosses lanes, and several of them hold the same sum: fused with the product by
the weight, each lane would round its own product less than its neighbour's, their sums would differ
in the last bit, and which one is stored would be left to chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvConfig:
    """Launch of a matrix-vector product per choice.

    Attributes:
        block_k: choices of one program, a power of two (down projection only).
        block_out: outputs of one program (a gate and its up count once).
        block_in: inputs that are read at a time.
        num_warps: warps of one program.
        num_stages: tiles in flight through shared memory, plus one.
    """

    block_k: int = 1
    block_out: int
    block_in: int
    num_warps: int = 4
    num_stages: int = 4


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def row_block(length: int, itemsize: int, most: int) -> int:
    """Power of two of at least one warp load and at most `most` inputs that pads `length` least.

    The widest of equals.
    """
    block = narrowest = WARP_LOAD_BYTES // itemsize
    best = block
    while block <= max(most, narrowest):
        if ceil_div(length, block) * block <= ceil_div(length, best) * best:
            best = block
        block *= 2
    return best


def gate_up_config(hidden: int, itemsize: int, *, has_gate: bool, transposed: bool) -> GemvConfig:
    """Configuration of the up projection."""
    matrices = 2 if has_gate else 1
    if transposed:
        # 128 bytes of each input's row, gate and up together: 9 % faster than 64 on an H100.
        block_out = max(1, 128 // itemsize // matrices)
        return GemvConfig(block_out=block_out, block_in=128, num_stages=3)
    row = next_power_of_2(hidden)
    if WARP_LOAD_BYTES <= row * itemsize <= _STAGE_BYTES // matrices:
        # Whole rows: 2 to 5 % faster than parts of more rows on an H100.
        block_out = 2 * _STAGE_BYTES // itemsize // matrices // row
        return GemvConfig(block_out=block_out, block_in=row, num_stages=2)
    block_in = row_block(hidden, itemsize, 512)
    return GemvConfig(
        block_out=max(1, _STAGE_BYTES // itemsize // matrices // block_in), block_in=block_in
    )


def down_config(intermediate: int, top_k: int, itemsize: int, *, transposed: bool) -> GemvConfig:
    """Configuration of the down projection, which also sums over K."""
    block_k = next_power_of_2(top_k)
    if transposed:
        # 64 bytes of each input's row: more programs than SMs matter more than longer rows, and
        # deeper pipelines make up for the few that there are.
        block_in = max(16, 256 // block_k)
        return GemvConfig(
            block_k=block_k, block_out=64 // itemsize, block_in=block_in, num_stages=5
        )
    # The intermediate is read again by every program: the more outputs of one program, the less.
    if block_k >= 8:
        # Half a warp's load of a row: 6 to 20 % faster than a whole load on an H100.
        block_in = WARP_LOAD_BYTES // itemsize // 2
    else:
        block_in = row_block(intermediate, itemsize, 512)
    block_out = max(1, 2 * _STAGE_BYTES // itemsize // block_in // block_k)
    return GemvConfig(block_k=block_k, block_out=block_out, block_in=block_in)


def gemv_down_constexprs(
    hidden: int, inner: int, top_k: int, config: GemvConfig, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of every down projection: its sizes and its blocks."""
    return {
        "H": hidden,
        "I": inner,
        "K": top_k,
        "HAS_BIAS": has_bias,
        "BLOCK_K": config.block_k,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "NUM_STAGES": config.num_stages,
    }


def up_constexprs(
    hidden: int, inner: int, top_k: int, form: ExpertForm, *, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of every up projection: its sizes, and what its gate does."""
    return {
        "H": hidden,
        "I": inner,
        "K": top_k,
        "HAS_GATE": form.has_gate,
        "HAS_BIAS": has_bias,
        "INTERLEAVED": form.interleaved,
        "ACTIVATION": form.activation,
        "LIMITED": form.is_limited,
        "LIMIT_AFTER": form.limit_after,
    }
