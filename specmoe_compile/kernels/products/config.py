"""Block sizes of `products_kernel`: a fixed rule per shape. No Triton in here.

Shape letters: N outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specmoe_compile.kernels.expert_mlp.config import ceil_div, row_block

_TILE_BYTES = 16384
# Programs that keep every SM of a large GPU busy.
_PROGRAMS = 528
# Of rows that are read in pieces.
_PIECE_BYTES = 1024
_LONG_BLOCK_OUT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductsConfig:
    """Launch of `products_kernel`.

    Attributes:
        block_out: outputs of one program.
        block_in: inputs that are read at a time, a power of two.
        num_warps: warps of one program.
        num_stages: tiles in flight, plus one.
    """

    block_out: int
    block_in: int
    num_warps: int = 4
    num_stages: int = 2


def products_config(outputs: Sequence[int], inputs: int, itemsize: int) -> ProductsConfig:
    """Whole rows of up to 4 KiB, 16 KiB a program; fewer where there would be few programs.

    Longer rows are read a KiB at a time, of up to eight outputs at once, three tiles ahead.

    Args:
        outputs: N of each weight.
        inputs: I.
        itemsize: bytes of one number.
    """
    block_in = row_block(inputs, itemsize, 4096 // itemsize)
    block_out = max(1, _TILE_BYTES // itemsize // block_in)
    while block_out > 1 and sum(ceil_div(n, block_out) for n in outputs) < _PROGRAMS:
        block_out //= 2
    if inputs > block_in:
        return ProductsConfig(
            block_out=min(_LONG_BLOCK_OUT, 2 * block_out),
            block_in=min(block_in, _PIECE_BYTES // itemsize),
            num_stages=4,
        )
    return ProductsConfig(block_out=block_out, block_in=block_in)
