"""Block sizes of the kernels for coded weights: a fixed rule per shape and code. No Triton in here.

Shape letters: H hidden, I expert intermediate, K top-k.
"""

from __future__ import annotations

from specmoe_compile.kernels.expert_mlp.config import (
    WARP_LOAD_BYTES,
    GemvConfig,
    ceil_div,
    next_power_of_2,
)
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode

_GROUP_MULTIPLE = 16  # inputs of the narrowest product of prefill
_LANE_BYTES = 16  # one load of a lane
# Codes of one program, in bytes: four loads of each of 128 lanes.
_TILE_BYTES = 8192
_MOST_PADDING = 0.1  # of a row's inputs; a masked lane reads nothing, but its place is lost


def reason_against(code: WeightCode, inputs: int) -> str | None:
    """Why the kernels cannot compute a weight of so many inputs in this code; None if they can."""
    if code.is_plain:
        return None
    bits, columns = code.functions.bits, code.block[1]
    if inputs * bits % 32:
        return f"a row has {inputs} codes of {bits} bits, expected a multiple of 4 bytes"
    if 0 < columns < inputs and columns % _GROUP_MULTIPLE:
        return f"{columns} inputs share a scale, expected a multiple of {_GROUP_MULTIPLE}"
    return None


def codes_per_lane(code: WeightCode) -> int:
    """Inputs of one lane's load."""
    return _LANE_BYTES * 8 // code.functions.bits


def unit_of(code: WeightCode, length: int) -> int:
    """Inputs that are summed before they are scaled: of one lane, and of one group."""
    lane = codes_per_lane(code)
    columns = code.block[1]
    if columns == 0 or columns >= length:
        return lane
    return min(lane, columns & -columns)


def _block_in(length: int, code: WeightCode, most_bytes: int) -> int:
    """Inputs of a tile: the widest power of two that pads `length` by at most `_MOST_PADDING`."""
    narrowest = codes_per_lane(code)
    block = max(narrowest, next_power_of_2(most_bytes * 8 // code.functions.bits))
    while block > narrowest and ceil_div(length, block) * block > length * (1 + _MOST_PADDING):
        block //= 2
    return block


def gate_up_config(hidden: int, code: WeightCode, *, has_gate: bool) -> GemvConfig:
    """Configuration of the up projection: whole rows where they fit, straight into registers.

    Pipelines through shared memory cost more than they hide: on an H200 FP8 of Qwen3-30B-A3B took
    20.5 us with three stages and 11.1 with one.
    """
    block_in = _block_in(hidden, code, 1024)
    row_bytes = block_in * code.functions.bits // 8
    rows = max(2, _TILE_BYTES // row_bytes) // (2 if has_gate else 1)
    return GemvConfig(block_out=max(1, min(rows, 8)), block_in=block_in, num_stages=1)


def up_fuses(config: GemvConfig, code: WeightCode, *, has_gate: bool) -> bool:
    """Whether a product and a sum may become one operation in the up projection.

    They may where every lane has a load of its own, so that it sums a whole unit by itself. In a
    smaller tile several lanes share a unit and hold the same sum: each would round its own product
    less than its neighbour's, as in `expert_mlp.config.DOWN_FP_FUSION`. Values of nf4 are loaded
    from a table, and Triton 3.6 spreads them over the lanes as it likes.
    """
    if code.book == "nf4":
        return False
    rows = config.block_out * (2 if has_gate else 1)
    tile_bytes = rows * config.block_in * code.functions.bits // 8
    return tile_bytes >= WARP_LOAD_BYTES * config.num_warps


def down_config(inner: int, top_k: int, code: WeightCode) -> GemvConfig:
    """Configuration of the down projection, which also sums over K.

    There are too few programs to hide what one waits for: here a pipeline pays.
    """
    block_k = next_power_of_2(top_k)
    many = block_k >= 8
    block_in = _block_in(inner, code, 128 if many else 256)
    row_bytes = block_in * code.functions.bits // 8
    tile_bytes = _TILE_BYTES // 2 if many else _TILE_BYTES
    return GemvConfig(
        block_k=block_k,
        block_out=max(1, min(16, tile_bytes // row_bytes // block_k)),
        block_in=block_in,
        num_stages=3,
    )
