"""Triton kernel of `gather_experts`: a fixed grid that copies a list of records, bank by bank.

The records of one bank and fill are cut into chunks; all chunks of all fills are dealt out to the
programs in turn, so that one record uses the whole grid as eight do. A thread has four loads of 16
bytes in flight: with 4096 threads 256 KiB, more than PCIe 5 x16 moves during one read's latency.

Shape letters: E experts, S slots, N fills at most, R bytes of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
# Words of one chunk: 128 threads x 4 loads x 4 words of 4 bytes.
BLOCK = 2048
MAX_BANKS = 4


@triton.jit
def copy_bank(
    source,
    destination,
    fill_experts,
    fill_slots,
    count,
    RECORD: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    DESTINATION_STRIDE: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy this program's chunks of `count` records of one bank.

    Args:
        source, destination: *u8.
        RECORD, SOURCE_STRIDE, DESTINATION_STRIDE: bytes.
        WORD: 4 where addresses and strides are multiples of 4, else 1. Loads become 16 bytes wide
            where Triton knows that they are multiples of 16.
        BLOCK: words of a chunk.
    """
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    # A multiple of 16 bytes, so that no load of 16 bytes is cut by the mask.
    WORDS: tl.constexpr = RECORD // 16 * (16 // WORD)
    CHUNKS: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    if WORDS > 0:
        if WORD == 4:
            from_words = source.to(tl.pointer_type(tl.int32), bitcast=True)
            to_words = destination.to(tl.pointer_type(tl.int32), bitcast=True)
        else:
            from_words = source
            to_words = destination
        # No `range`: the interpreter of Triton 3.6 cannot take its bounds from tensors with NumPy
        # 2.4. The machine code is the same.
        task = first
        while task < count * CHUNKS:
            fill = task // CHUNKS
            expert = tl.load(fill_experts + fill).to(tl.int64)
            slot = tl.load(fill_slots + fill).to(tl.int64)
            words = (task % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
            if tl.minimum(expert, slot) >= 0:
                record = from_words + expert * (SOURCE_STRIDE // WORD)
                place = to_words + slot * (DESTINATION_STRIDE // WORD)
                # Read once: should not push other lines out of the caches.
                values = tl.load(record + words, mask=words < WORDS, eviction_policy="evict_first")
                tl.store(place + words, values, mask=words < WORDS)
            task += programs
    if RECORD % 16 > 0:
        fill = first
        while fill < count:
            expert = tl.load(fill_experts + fill).to(tl.int64)
            slot = tl.load(fill_slots + fill).to(tl.int64)
            tail = RECORD // 16 * 16 + tl.arange(0, 16)
            if tl.minimum(expert, slot) >= 0:
                place = destination + slot * DESTINATION_STRIDE
                values = tl.load(source + expert * SOURCE_STRIDE + tail, mask=tail < RECORD)
                tl.store(place + tail, values, mask=tail < RECORD)
            fill += programs


@triton.jit(do_not_specialize_on_alignment=["fill_experts", "fill_slots", "fill_count"])
def gather_experts_kernel(
    source0,
    source1,
    source2,
    source3,
    destination0,
    destination1,
    destination2,
    destination3,
    fill_experts,
    fill_slots,
    fill_count,
    N: tl.constexpr,
    BANKS: tl.constexpr,
    RECORD0: tl.constexpr,
    RECORD1: tl.constexpr,
    RECORD2: tl.constexpr,
    RECORD3: tl.constexpr,
    SOURCE_STRIDE0: tl.constexpr,
    SOURCE_STRIDE1: tl.constexpr,
    SOURCE_STRIDE2: tl.constexpr,
    SOURCE_STRIDE3: tl.constexpr,
    DESTINATION_STRIDE0: tl.constexpr,
    DESTINATION_STRIDE1: tl.constexpr,
    DESTINATION_STRIDE2: tl.constexpr,
    DESTINATION_STRIDE3: tl.constexpr,
    WORD0: tl.constexpr,
    WORD1: tl.constexpr,
    WORD2: tl.constexpr,
    WORD3: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy up to four banks; any grid (programs,). Banks from BANKS on are not touched."""
    count = tl.minimum(tl.load(fill_count), N)
    copy_bank(
        source0, destination0, fill_experts, fill_slots, count,
        RECORD0, SOURCE_STRIDE0, DESTINATION_STRIDE0, WORD0, BLOCK,
    )  # fmt: skip
    if BANKS > 1:
        copy_bank(
            source1, destination1, fill_experts, fill_slots, count,
            RECORD1, SOURCE_STRIDE1, DESTINATION_STRIDE1, WORD1, BLOCK,
        )  # fmt: skip
    if BANKS > 2:
        copy_bank(
            source2, destination2, fill_experts, fill_slots, count,
            RECORD2, SOURCE_STRIDE2, DESTINATION_STRIDE2, WORD2, BLOCK,
        )  # fmt: skip
    if BANKS > 3:
        copy_bank(
            source3, destination3, fill_experts, fill_slots, count,
            RECORD3, SOURCE_STRIDE3, DESTINATION_STRIDE3, WORD3, BLOCK,
        )  # fmt: skip


class BankLayout(NamedTuple):
    """Bytes of a record, from record to record on both sides, and of the word to copy by."""

    record: int
    source_stride: int
    destination_stride: int
    word: int


def gather_constants(banks: Sequence[BankLayout], fills: int) -> dict[str, int]:
    """All constexpr arguments of `gather_experts_kernel`; absent banks repeat the first."""
    constants = {"N": fills, "BANKS": len(banks), "BLOCK": BLOCK}
    for place in range(MAX_BANKS):
        bank = banks[place] if place < len(banks) else banks[0]
        constants[f"RECORD{place}"] = bank.record
        constants[f"SOURCE_STRIDE{place}"] = bank.source_stride
        constants[f"DESTINATION_STRIDE{place}"] = bank.destination_stride
        constants[f"WORD{place}"] = bank.word
    return constants


def bank_layout(source: Tensor, destination: Tensor) -> BankLayout:
    """How a bank lies in memory."""
    strides = (source.stride(0), destination.stride(0))
    common = gcd(source.data_ptr(), destination.data_ptr(), *strides)
    return BankLayout(destination.shape[1], *strides, 4 if common % 4 == 0 else 1)


def launch_gather(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
    *,
    programs: int,
) -> None:
    """Launch `gather_experts_kernel` on the current stream; arguments as in `gather_experts`.

    Triton passes the device's address of a pinned host tensor, as of any tensor.
    """
    pairs = list(zip(sources, destinations, strict=True))
    banks = [bank_layout(source, destination) for source, destination in pairs]
    absent = MAX_BANKS - len(pairs)
    gather_experts_kernel[(programs,)](
        *sources,
        *(sources[0],) * absent,
        *destinations,
        *(destinations[0],) * absent,
        fill_experts,
        fill_slots,
        fill_count,
        **gather_constants(banks, fill_experts.shape[0]),
        num_warps=NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=True,
    )
