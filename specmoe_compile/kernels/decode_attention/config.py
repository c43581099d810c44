"""How attention is cut into tiles and parts.

Shape letters: B sequences, G heads of keys and values, Q new tokens, S cache length, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

_PROGRAMS_PER_SM = 2
_SINGLE_PART_KEYS = 256
_TILE_BYTES = 16384
_PARTS_BLOCK = 32


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Tiles of one launch: rows (queries x heads), keys per tile, parts, warps, pipeline depth."""

    block_m: int
    block_n: int
    parts: int
    num_warps: int
    num_stages: int


def attention_config(
    *, groups: int, rows: int, length: int, head: int, itemsize: int, processors: int
) -> AttentionConfig:
    """Choose the tiles.

    Args:
        groups: B x G, programs without a split.
        rows: query heads per head of keys x Q.
        length: S.
        head: D.
        itemsize: bytes of one key's element.
        processors: multiprocessors of the GPU.
    """
    block_m = max(16, triton.next_power_of_2(rows))
    head_bytes = triton.next_power_of_2(head) * itemsize
    block_n = max(16, min(128, _TILE_BYTES // head_bytes))
    tiles = triton.cdiv(length, block_n)
    parts = min(tiles, max(1, processors * _PROGRAMS_PER_SM // groups))
    if length <= _SINGLE_PART_KEYS:
        parts = 1
    # Three tiles of a large head and the queries do not fit the shared memory of sm_86.
    stages = 3 if head <= 128 else 2
    return AttentionConfig(block_m, block_n, parts, num_warps=4, num_stages=stages)


def parts_block(parts: int) -> int:
    """Parts of one query that are put together at once, a power of two."""
    return min(_PARTS_BLOCK, triton.next_power_of_2(parts))
