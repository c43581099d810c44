"""Block sizes of the grouped kernels: a fixed rule per shape. No Triton in here."""

from __future__ import annotations

from dataclasses import dataclass

from specmoe_compile.kernels.expert_mlp.config import next_power_of_2


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedConfig:
    """Launch of one grouped product.

    Attributes:
        block_m: choices of one program, all of one slot.
        block_n: outputs of one program (a gate and its up count once).
        block_in: inputs that are read at a time.
        num_warps: warps of one program.
        num_stages: tiles in flight through shared memory, plus one.
    """

    block_m: int
    block_n: int
    block_in: int
    num_warps: int
    num_stages: int


def block_m(choices: int, slots: int, itemsize: int) -> int:
    """Rows of a tile: about as many as an expert has choices, if they are spread evenly.

    16 is the least that tensor cores take; a larger tile than needed multiplies padding.
    """
    most = 128 if itemsize == 2 else 32
    return max(16, min(most, next_power_of_2(max(1, choices // max(1, slots)))))


def gate_up_config(rows: int, itemsize: int, *, has_gate: bool) -> GroupedConfig:
    """Configuration of the grouped up projection for tiles of `rows` choices."""
    if itemsize == 4:
        # Without TF32 products of float32 run on the plain cores and take registers.
        return GroupedConfig(block_m=rows, block_n=32, block_in=32, num_warps=4, num_stages=3)
    return GroupedConfig(
        block_m=rows,
        block_n=64 if has_gate else 128,
        block_in=64,
        num_warps=8 if rows >= 128 else 4,
        num_stages=3,
    )


def down_config(rows: int, itemsize: int) -> GroupedConfig:
    """Configuration of the grouped down projection for tiles of `rows` choices."""
    if itemsize == 4:
        return GroupedConfig(block_m=rows, block_n=32, block_in=32, num_warps=4, num_stages=3)
    return GroupedConfig(
        block_m=rows, block_n=128, block_in=64, num_warps=8 if rows >= 128 else 4, num_stages=3
    )
