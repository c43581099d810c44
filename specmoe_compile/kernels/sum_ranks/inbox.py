"""Where the parts of other ranks arrive, on this rank's GPU.

An inbox holds two pages, which sums take in turns, so that a rank that is a sum ahead writes where
nobody reads any more. A page has a shelf for each rank; a shelf holds letters of 8 bytes: 4 bytes
of a tensor below the number of the sum. A letter is written whole, so that whoever reads the number
that he waits for has the tensor's bytes, too.

Shape letters: N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_WORDS = 128
"""Words of 4 bytes of one program."""
MAX_BYTES = 256 << 10
"""The largest tensor: 16 tokens of 4096 in float32. Reading all ranks' takes longer than a ring
for larger ones, and an inbox has 4 N times as much."""
MAX_RANKS = 8
SHELF_LETTERS = MAX_BYTES // 4
PAGES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Inbox:
    """One rank's inbox, and where the others' are.

    Attributes:
        rank: this rank's, from 0.
        letters: [PAGES * N * SHELF_LETTERS] int64, which all ranks' GPUs can write.
        addresses: [N] int64: of the letters of each rank, as this rank's GPU reaches them.
        sums: [SHELF_LETTERS / BLOCK_WORDS] int32: how many sums each program has taken part in.
        kept: what keeps the other ranks' letters mapped.
    """

    rank: int
    letters: Tensor
    addresses: Tensor
    sums: Tensor
    kept: object

    @property
    def ranks(self) -> int:
        """N."""
        return self.addresses.shape[0]


def make_inbox(rank: int, letters: Tensor, addresses: Sequence[int], kept: object = None) -> Inbox:
    """An inbox of letters that no sum has used yet: they are set to zero here.

    No rank may begin a sum before all have done this.

    Args:
        rank: this rank's.
        letters: of this rank, `letter_count` int64.
        addresses: of the letters of every rank.
        kept: what is to live as long as the inbox.
    """
    device = letters.device
    return Inbox(
        rank=rank,
        letters=letters.zero_(),
        addresses=torch.tensor(addresses, dtype=torch.int64, device=device),
        sums=torch.zeros(SHELF_LETTERS // BLOCK_WORDS, dtype=torch.int32, device=device),
        kept=kept,
    )


def letter_count(ranks: int) -> int:
    """Letters of an inbox of so many ranks."""
    return PAGES * ranks * SHELF_LETTERS


_INBOXES: dict[str, Inbox] = {}


def use_inbox(group: str, inbox: Inbox) -> None:
    """Make an inbox that of a process group, by its name; sums in graphs keep the one they had."""
    _INBOXES[group] = inbox


def inbox_or_none(group: str) -> Inbox | None:
    """The inbox of a process group, by its name."""
    return _INBOXES.get(group)
