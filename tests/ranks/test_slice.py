"""What one rank has of the experts, and what it makes of the others'."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers.distributed

from specmoe_compile.errors import SpecMoEError, UnsupportedModelError
from specmoe_compile.hf.ranks import join_ranks
from specmoe_compile.runtime.cpu.experts import Routing
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.slice import SliceStore
from tests.ranks.groups import needs_expert_parallel

LAYOUT = ExpertLayout.from_shapes({"down_proj": ((2, 2), torch.float32)})


class Whole(ExpertStore):
    kind = "disk"

    def __init__(self) -> None:
        layer = StoreLayer(name="experts", num_experts=6, layout=LAYOUT)
        super().__init__([layer], fingerprint="f", top_k=2)
        self.closed = False
        self.read: list[int] = []

    def read_into(self, layer: int, expert: int, record: torch.Tensor | memoryview) -> None:
        self.read.append(expert)

    def close(self) -> None:
        self.closed = True


class Runner:
    """As much of an `ExpertRunner` as a routing asks for."""

    dtype = torch.float32
    native = None
    num_experts = 3
    foreign = 3

    def own(self, row: list[int]) -> list[int]:
        return [expert for expert in row if expert != self.foreign]

    def check_ids(self, experts: list[int]) -> None:
        if experts and (min(experts) < 0 or max(experts) >= self.num_experts):
            raise SpecMoEError("out of range")

    def run(self, weights: object, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_slice_reads_its_own_part_of_a_store() -> None:
    whole = Whole()
    part = SliceStore(whole, 1, 2)
    record = torch.empty(LAYOUT.record_bytes, dtype=torch.uint8)
    for expert in range(3):
        part.read_into(0, expert, record)
    assert whole.read == [3, 4, 5]
    assert part.num_experts == (3,) and part.total_bytes == whole.total_bytes // 2
    with pytest.raises(ValueError, match="3 experts"):
        part.read_into(0, 3, record)
    part.close()
    assert whole.closed


def test_an_uneven_slice_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="6 experts cannot be split evenly over 4"):
        SliceStore(Whole(), 0, 4)


@pytest.mark.parametrize(
    "ids",
    [[[1, 3]], [[3, 3]], [[0, 3], [3, 1], [3, 3]], [[3, 3], [3, 3]]],
    ids=["one", "none", "several", "none_of_several"],
)
def test_experts_of_other_ranks_are_neither_asked_for_nor_computed(ids: list[list[int]]) -> None:
    chosen = torch.tensor(ids)
    x = torch.ones(len(ids), 2)
    routing = Routing(x, chosen, Runner())
    assert set(routing.experts) == {e for row in ids for e in row if e != 3}
    y = torch.zeros(chosen.numel(), 2)
    routing.compute([(expert, None) for expert in routing.experts], Runner(), y)
    assert torch.equal(y[:, 0], torch.where(chosen.reshape(-1) == 3, 0.0, 2.0))


def test_an_id_beyond_the_other_ranks_is_refused() -> None:
    for ids in ([[1, 4]], [[0, 4], [3, 1]]):
        with pytest.raises(SpecMoEError, match="out of range"):
            Routing(torch.ones(len(ids), 2), torch.tensor(ids), Runner())


def test_a_transformers_without_expert_parallelism_says_which_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
    monkeypatch.delattr(transformers.distributed, "expert_parallel", raising=False)
    with pytest.raises(UnsupportedModelError, match=r"cannot split experts over ranks.*: 5.24 can"):
        join_ranks({"tp_size": 2, "ep_size": 2}, torch.device("cpu"))


@needs_expert_parallel
def test_ranks_that_nobody_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"not started by torchrun.*--nproc-per-node 2"):
        join_ranks({"tp_size": 2, "ep_size": 2}, torch.device("cpu"))
    with pytest.raises(ValueError, match="tp_size=1, ep_size=1 and 2 ranks of other kinds"):
        join_ranks({"fsdp_size": 2}, torch.device("cpu"))
    with pytest.raises(ValueError, match="ep_implementation='all_to_all'"):
        join_ranks(
            {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}, torch.device("cpu")
        )
    with pytest.raises(TypeError, match="distributed_config=3"):
        join_ranks(3, torch.device("cpu"))
    assert join_ranks({"tp_size": 1, "ep_size": 1}, torch.device("cpu")) is None
