"""Opening inboxes: what all ranks agree on, and each thing that can go wrong on one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specmoe_compile.kernels.sum_ranks import inbox as inbox_module
from specmoe_compile.kernels.sum_ranks.inbox import MAX_RANKS, inbox_or_none, letter_count
from specmoe_compile.runtime.cuda import inboxes
from specmoe_compile.runtime.cuda.inboxes import open_inboxes

GPU = torch.device("cuda", 0)


class Group:
    """A process group, seen from rank 0."""

    def __init__(self, size: int = 2) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


class Memory:
    """Symmetric memory on the CPU; `fails` names the call that cannot be done."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.opened = fails, 0
        self.others: dict[int, torch.Tensor] = {}

    def empty(self, count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self._do("empty")
        self.opened += 1
        return torch.full((count,), 7, dtype=dtype)

    def rendezvous(self, tensor: torch.Tensor, group: Group) -> Any:
        self._do("rendezvous")
        self.others = {rank: torch.zeros_like(tensor) for rank in range(1, group.size())}

        def remote(rank: int, sizes: Any, dtype: torch.dtype) -> torch.Tensor:
            return self.others[rank]

        return SimpleNamespace(get_buffer=remote)

    def _do(self, what: str) -> None:
        if self.fails == what:
            raise RuntimeError(f"{what}: no such handle\nand a long trace")


class Ranks:
    """The group of this test, its memory, and what the other rank says in each exchange."""

    def __init__(self) -> None:
        self.group, self.memory = Group(), Memory()
        self.other: Callable[[int, Any], Any] = lambda number, mine: mine
        self.exchanges = 0

    def gather(self, value: Any, group: Group) -> list[Any]:
        self.exchanges += 1
        others = [self.other(self.exchanges, value) for _ in range(group.size() - 1)]
        return [value, *others]

    def open(self) -> str | None:
        return open_inboxes(["tp"], GPU)["tp"]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    made = Ranks()
    monkeypatch.setattr(inboxes, "_decided", {})
    monkeypatch.setattr(inbox_module, "_INBOXES", {})
    monkeypatch.setattr(inboxes, "_gather", made.gather)
    monkeypatch.setattr(inboxes, "_symmetric_memory_or_none", lambda: made.memory)
    monkeypatch.setattr(inboxes, "_uuid", lambda device: f"gpu-{device.index}")
    resolve = "torch.distributed.distributed_c10d._resolve_process_group"
    monkeypatch.setattr(resolve, lambda name: made.group)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: True)
    yield made


def test_an_inbox_is_opened_once_and_is_empty(ranks: Ranks) -> None:
    assert ranks.open() is None and ranks.open() is None
    assert ranks.memory.opened == 1
    inbox = inbox_or_none("tp")
    assert inbox is not None and (inbox.rank, inbox.ranks) == (0, 2)
    assert inbox.letters.shape == (letter_count(2),) and not inbox.letters.any()
    theirs = ranks.memory.others[1].data_ptr()
    assert inbox.addresses.tolist() == [inbox.letters.data_ptr(), theirs]
    assert not inbox.sums.any()


def test_another_group_of_the_same_name_gets_an_inbox_of_its_own(ranks: Ranks) -> None:
    assert ranks.open() is None
    first = inbox_or_none("tp")
    ranks.group = Group()
    assert ranks.open() is None
    assert ranks.memory.opened == 2 and inbox_or_none("tp") is not first


@pytest.mark.parametrize("call", ["empty", "rendezvous"])
def test_memory_that_cannot_be_shared_is_one_line(ranks: Ranks, call: str) -> None:
    ranks.memory = Memory(fails=call)
    assert ranks.open() == f"rank 0 could not share memory: {call}: no such handle"
    assert inbox_or_none("tp") is None
    assert ranks.open() is not None and ranks.exchanges == 3, "not tried again"


def test_all_ranks_do_without_where_one_has_to(ranks: Ranks) -> None:
    ranks.other = lambda number, mine: "rank 1 could not" if number == 3 else mine
    assert ranks.open() == "rank 1 could not"
    ranks.group = Group()
    ranks.exchanges = 0
    ranks.other = lambda number, mine: ("Triton is not installed", *mine[1:])
    assert ranks.open() == "Triton is not installed" and ranks.exchanges == 1


def test_gpus_that_cannot_be_reached_are_named(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.other = lambda number, mine: (None, mine[1], "gpu-1") if number == 1 else mine
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: False)
    assert ranks.open() == "cuda:0 cannot reach the memory of cuda:1"
    assert ranks.memory.opened == 0


def test_ranks_of_several_machines_reduce(ranks: Ranks) -> None:
    ranks.other = lambda number, mine: (None, "another-host", "gpu-1") if number == 1 else mine
    assert ranks.open() == "its ranks are on several machines" and ranks.memory.opened == 0


def test_too_many_ranks_and_a_pytorch_without_are_said(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.group = Group(MAX_RANKS + 1)
    assert ranks.open() == f"it has {MAX_RANKS + 1} ranks, expected 2 to {MAX_RANKS}"
    for memory in (None, SimpleNamespace(empty=None)):
        ranks.group = Group()
        monkeypatch.setattr(inboxes, "_symmetric_memory_or_none", lambda memory=memory: memory)
        assert str(ranks.open()).endswith("has no symmetric memory")


def test_more_ranks_than_were_tried_reduce_unless_asked_for(ranks: Ranks) -> None:
    ranks.group = Group(4)
    assert open_inboxes(["tp"], GPU, 2)["tp"] == "it has 4 ranks, and more than 2 were not tried"
    assert ranks.exchanges == 0
    assert open_inboxes(["tp"], GPU)["tp"] is None


def test_a_model_on_the_cpu_reduces(ranks: Ranks) -> None:
    assert open_inboxes(["tp"], torch.device("cpu")) == {"tp": "the model is on cpu"}
    assert ranks.exchanges == 0
