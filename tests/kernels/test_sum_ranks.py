"""The sum over ranks: its kernel beside letters by hand, and two processes that write letters."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.kernels.sum_ranks import inbox as inbox_module
from specmoe_compile.kernels.sum_ranks import op
from specmoe_compile.kernels.sum_ranks.inbox import (
    BLOCK_WORDS,
    MAX_BYTES,
    SHELF_LETTERS,
    Inbox,
    letter_count,
    make_inbox,
    use_inbox,
)
from specmoe_compile.kernels.sum_ranks.kernel import launch_sum_ranks
from specmoe_compile.kernels.sum_ranks.op import reason_against, sum_ranks
from specmoe_compile.kernels.sum_ranks.reference import sum_ranks_reference
from tests.kernels.expert_cases import DEVICE, nan_like
from tests.kernels.sum_pair import ROUNDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = 0xFFFFFFFF
LIMIT_S = 600.0
"""Longer than any machine takes."""


class World:
    """All ranks' inboxes in one process, and their letters written by hand."""

    def __init__(self, ranks: int) -> None:
        self.letters = [
            torch.full((letter_count(ranks),), -1, dtype=torch.int64, device=DEVICE)
            for _ in range(ranks)
        ]
        addresses = [each.data_ptr() for each in self.letters]
        self.inboxes: list[Inbox] = [
            make_inbox(rank, letters, addresses) for rank, letters in enumerate(self.letters)
        ]

    def shelf(self, owner: int, sender: int, number: int) -> Tensor:
        """Letters from a rank to another, of the sum of a number."""
        start = ((number % 2) * len(self.letters) + sender) * SHELF_LETTERS
        return self.letters[owner][start : start + SHELF_LETTERS]

    def send(self, owner: int, sender: int, number: int, part: Tensor) -> None:
        """Put a part into an inbox."""
        self.shelf(owner, sender, number)[: words(part).numel()] = as_letters(part, number)


def words(part: Tensor) -> Tensor:
    return part.view(-1).view(torch.int32)


def as_letters(part: Tensor, number: int) -> Tensor:
    return (words(part).long() & LOW) | (torch.tensor(number, device=DEVICE).int().long() << 32)


def summed(part: Tensor, inbox: Inbox) -> Tensor:
    out = nan_like(*part.shape, dtype=part.dtype)
    launch_sum_ranks(words(part), words(out), inbox, str(part.dtype).removeprefix("torch."))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_adds_up_in_the_order_of_the_ranks_and_writes_to_all(
    ranks: int, dtype: torch.dtype
) -> None:
    world = World(ranks)
    # One program sums more often than the others.
    sizes = (2, 2 * BLOCK_WORDS, 2 * BLOCK_WORDS + 6, 1000)
    for rank in range(ranks):
        for number, size in enumerate(sizes, start=1):
            numbers = torch.randn(ranks, 1, size, device=DEVICE)
            parts = [(3 ** (r % 4) * x).to(dtype) for r, x in enumerate(numbers)]
            counts = world.inboxes[rank].sums.clone()
            # Programs count for themselves; the same sizes in the same order keep ranks alike.
            for sender in set(range(ranks)) - {rank}:
                for block in range(0, words(parts[0]).numel(), BLOCK_WORDS):
                    sum_number = int(counts[block // BLOCK_WORDS]) + 1
                    piece = words(parts[sender])[block : block + BLOCK_WORDS]
                    there = world.shelf(rank, sender, sum_number)
                    there[block : block + piece.numel()] = (piece.long() & LOW) | (sum_number << 32)
            out = summed(parts[rank], world.inboxes[rank])
            assert torch.equal(out, sum_ranks_reference(parts)), (rank, number)
            first = int(counts[0]) + 1
            block = words(parts[rank])[:BLOCK_WORDS]
            for other in set(range(ranks)) - {rank}:
                sent = world.shelf(other, rank, first)[: block.numel()]
                assert torch.equal(sent, (block.long() & LOW) | (first << 32))


def test_signs_of_zero_infinities_and_nans_are_those_of_a_sum() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 3e38, 1e-45])
    for dtype in DTYPES:
        parts = [values.to(DEVICE, dtype).repeat(8), values.to(DEVICE, dtype).repeat_interleave(8)]
        world = World(2)
        world.send(0, 1, 1, parts[1])
        out = summed(parts[0], world.inboxes[0])
        expected = sum_ranks_reference(parts)
        assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(out.signbit()[~out.isnan()], expected.signbit()[~out.isnan()])


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**32 - 1])
def test_numbers_begin_again_after_all_have_been_used(number: int) -> None:
    world = World(2)
    signed = torch.tensor(number).to(torch.int32)
    world.inboxes[0].sums.fill_(signed - 1)
    parts = [torch.randn(4, device=DEVICE) for _ in range(2)]
    world.send(0, 1, number, parts[1])
    assert torch.equal(summed(parts[0], world.inboxes[0]), sum_ranks_reference(parts))
    assert int(world.inboxes[0].sums[0]) == int(signed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shares host memory; tests/ranks has GPUs")
def test_two_processes_that_write_to_each_other_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kernels.sum_pair", str(tmp_path)]
    pair = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    try:
        assert [each.wait(LIMIT_S) for each in pair] == [0, 0]
    finally:
        for each in pair:
            each.kill()  # one that waits for a rank that is gone waits for ever
    first, second = (torch.load(tmp_path / f"sums{rank}.pt") for rank in range(2))
    assert len(first) == ROUNDS
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine["out"], other["out"]), "both have the same bits"
        assert torch.equal(mine["out"], sum_ranks_reference([mine["part"], other["part"]]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs what a GPU runs in the interpreter")
def test_the_op_takes_any_layout_and_asks_for_an_inbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_INBOXES", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = torch.randn(1, 3, 130).to(torch.bfloat16)
    with pytest.raises(SpecMoEError, match="the process group 'tp' has no inbox on this rank"):
        op._cuda(x, "tp")
    for mine in (x, x.transpose(1, 2), x[..., 1:129]):
        world = World(2)
        use_inbox("tp", world.inboxes[0])
        part = torch.randn(mine.shape).to(x.dtype)
        world.send(0, 1, 1, part)
        out = op._cuda(mine, "tp")
        assert out.is_contiguous() and out.shape == mine.shape
        assert torch.equal(out, sum_ranks_reference([mine, part]))


def test_what_cannot_be_summed_is_said() -> None:
    assert reason_against((1, 2048), torch.bfloat16) is None
    assert reason_against((MAX_BYTES // 4,), torch.float32) is None
    assert "int64" in str(reason_against((4,), torch.int64))
    for shape in ((3,), (0,), (MAX_BYTES,)):
        assert "expected a multiple of 4 up to" in str(reason_against(shape, torch.bfloat16))
    with pytest.raises(TypeError, match="x cannot be summed: it is int32"):
        sum_ranks(torch.zeros(4, dtype=torch.int32), "0")
    with pytest.raises(ValueError, match="it has 6 bytes"):
        sum_ranks(torch.zeros(3, dtype=torch.bfloat16), "0")
