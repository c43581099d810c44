"""Triton kernel of `sum_ranks`: a warp sends its words to all ranks, and adds up what arrives.

A rank writes its part into the inbox of every other rank and waits for theirs in its own: one way
over the link, where a ring takes two, and no barrier. Each letter carries the number of the sum
(`inbox.py` says how), so that nothing else says that it is there.

That two pages are enough: a rank begins sum n after its sum n - 1, so after each other rank wrote
its part of that, which it did after its sum n - 2, whose page sum n writes over. All of this holds
for each program's words by themselves: programs of one number count their sums alike on all ranks,
and work on the same words of all tensors.

Shape letters: N ranks, W words of 4 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specmoe_compile.kernels.sum_ranks.inbox import BLOCK_WORDS, SHELF_LETTERS, Inbox

LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def numbers_of(words, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers that int32 words hold, in fp32: one, or two where they are HALVES."""
    if HALVES:
        low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        return low, high
    else:
        number = words.to(tl.float32, bitcast=True)
        return number, number


@triton.jit
def words_of(first, second, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    """The reverse of `numbers_of`, rounded to DTYPE."""
    if HALVES:
        low = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        high = second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        return (high << 16) | (low & 0xFFFF)
    else:
        return first.to(tl.int32, bitcast=True)


@triton.jit
def is_missing(letters, number, mask):
    """Whether a letter is not yet one of the sum of a number."""
    others = mask & ((letters >> 32).to(tl.int32) != number)
    return tl.sum(others.to(tl.int32), axis=0) > 0


@triton.jit
def letters_at(address):
    """The pointer that `address` points to; an inbox is aligned, so that letters go in pairs."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def sum_ranks_kernel(
    x,
    out,
    addresses,
    sums,
    words,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HALVES: tl.constexpr,
    DTYPE: tl.constexpr,
    SHELF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = x of rank 0 + x of rank 1 + ...; grid (ceil(W / BLOCK),), a warp each.

    Args:
        x, out: [W] int32 words of fp32 numbers, or of pairs of DTYPE.
        addresses: [N] int64, of each rank's letters; sums: [>= grid] int32, this rank's.
        words: W.
    """
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    mask = at < words
    mine = tl.load(x + at, mask=mask, other=0)
    number = tl.load(sums + program) + 1
    page = (number & 1) * (RANKS * SHELF)
    letters = (number.to(tl.int64) << 32) | (mine.to(tl.int64) & LOW_WORD)
    for step in tl.static_range(1, RANKS):
        # Each rank begins with its neighbour, so that not all write to one at once.
        inbox = letters_at(addresses + (RANK + step) % RANKS)
        tl.store(inbox + page + RANK * SHELF + at, letters, mask=mask, cache_modifier=".wt")

    own = letters_at(addresses + RANK) + page
    first, second = numbers_of(mine, HALVES, DTYPE)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            part = mine
        else:
            shelf = own + rank * SHELF + at
            letters = tl.load(shelf, mask=mask, other=0, volatile=True)
            while is_missing(letters, number, mask):
                letters = tl.load(shelf, mask=mask, other=0, volatile=True)
            part = letters.to(tl.int32)
        low, high = numbers_of(part, HALVES, DTYPE)
        # The first is taken as it is: 0.0 + -0.0 would be 0.0.
        first = low if rank == 0 else first + low
        second = high if rank == 0 else second + high
    tl.store(out + at, words_of(first, second, HALVES, DTYPE), mask=mask)
    tl.store(sums + program, number)


DTYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}


def launch_sum_ranks(x: Tensor, out: Tensor, inbox: Inbox, dtype: str) -> None:
    """Launch `sum_ranks_kernel` on the current stream; writes `out`.

    Args:
        x, out: [W] int32, contiguous.
        dtype: of the numbers, a name in `DTYPES`.
    """
    sum_ranks_kernel[(triton.cdiv(x.numel(), BLOCK_WORDS),)](
        x,
        out,
        inbox.addresses,
        inbox.sums,
        x.numel(),
        RANK=inbox.rank,
        RANKS=inbox.ranks,
        HALVES=dtype != "float32",
        DTYPE=DTYPES[dtype],
        SHELF=SHELF_LETTERS,
        BLOCK=BLOCK_WORDS,
        num_warps=1,
        num_stages=1,
    )
