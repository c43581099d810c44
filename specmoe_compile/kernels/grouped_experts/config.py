"""Block sizes of the grouped kernels: a fixed rule per shape. No Triton in here."""

from __future__ import annotations

from dataclasses import dataclass, replace

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


def _fitted(config: GroupedConfig, scale_columns: int) -> GroupedConfig:
    """With inputs of one scale at a time, if weights have scales apart (0: they have none)."""
    if scale_columns == 0:
        return config
    return replace(config, block_in=min(config.block_in, scale_columns & -scale_columns))


def gate_up_config(
    rows: int, itemsize: int, *, has_gate: bool, scale_columns: int = 0
) -> GroupedConfig:
    """Configuration of the grouped up projection for tiles of `rows` choices."""
    return _fitted(_gate_up_config(rows, itemsize, has_gate=has_gate), scale_columns)


def down_config(rows: int, itemsize: int, *, scale_columns: int = 0) -> GroupedConfig:
    """Configuration of the grouped down projection for tiles of `rows` choices."""
    return _fitted(_down_config(rows, itemsize), scale_columns)


def _gate_up_config(rows: int, itemsize: int, *, has_gate: bool) -> GroupedConfig:
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


def _down_config(rows: int, itemsize: int) -> GroupedConfig:
    if itemsize == 4:
        return GroupedConfig(block_m=rows, block_n=32, block_in=32, num_warps=4, num_stages=3)
    return GroupedConfig(
        block_m=rows, block_n=128, block_in=64, num_warps=8 if rows >= 128 else 4, num_stages=3
    )
