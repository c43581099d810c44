"""Sorting choices by slot and cutting them into tiles, on the device and without waiting for it.

Shape letters: T tokens, K top-k, S slots, N = T * K choices, M tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TilePlan(NamedTuple):
    """Tiles of choices that share a slot.

    `order`: [N] int64, choices sorted by slot, equal ones in their old order. Tile m holds the
    choices order[start[m]:end[m]] of slot slot[m], whose tiles are first[m] .. first[m] + count[m].
    All but `order` are [M] int32; slot -1 marks a tile that is not needed.
    """

    order: Tensor
    slot: Tensor
    start: Tensor
    end: Tensor
    first: Tensor
    count: Tensor


def max_tiles(choices: int, slots: int, block_m: int) -> int:
    """Tiles that N choices need at most: full ones, and one with the rest of each slot."""
    return min(choices, slots + choices // block_m)


def plan_tiles(slots: Tensor, num_slots: int, block_m: int) -> TilePlan:
    """Sort choices by slot and cut each slot's choices into tiles of at most `block_m`.

    The number of tiles depends on shapes alone, so that nothing waits for the device.

    Args:
        slots: [T, K] int32 or int64, -1 for choices to leave out.
        num_slots: S; slots are below it.
    """
    device = slots.device
    sorted_slots, order = torch.sort(slots.reshape(-1), stable=True)
    bounds = torch.arange(num_slots + 1, device=device, dtype=sorted_slots.dtype)
    offsets = torch.searchsorted(sorted_slots, bounds)  # [S + 1]
    tiles = (offsets[1:] - offsets[:-1] + (block_m - 1)) // block_m
    tiles_end = tiles.cumsum(0)
    numbers = torch.arange(max_tiles(slots.numel(), num_slots, block_m), device=device)
    slot = torch.searchsorted(tiles_end, numbers, right=True)
    needed = slot < num_slots
    slot = slot.clamp(max=num_slots - 1)
    count = tiles[slot]
    first = tiles_end[slot] - count
    start = offsets[slot] + (numbers - first) * block_m
    end = torch.minimum(start + block_m, offsets[slot + 1])
    slot = torch.where(needed, slot, -1)
    return TilePlan(order, *(column.to(torch.int32) for column in (slot, start, end, first, count)))
