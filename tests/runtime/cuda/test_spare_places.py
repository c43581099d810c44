"""Policy `adaptive` on a device computes from spare places what is worth less than all slots hold.

Its decisions are those of the Python policy, with the one area of spare places that all layers
share; `tests/kernels/test_plan_cache.py` compares the kernel with the same policy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cuda.decoder import Decoder
from specmoe_compile.runtime.cuda.tables import DeviceCache
from specmoe_compile.runtime.experts.layout import ExpertLayout
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.cuda.test_disk_supply import Disk
from tests.runtime.cuda.test_resident import opened
from tests.runtime.fakes import E, K, L, reference, token_batch
from tests.runtime.test_session import MODULES, RECORD

SLOTS = 4
WARM_UP = 64  # steps after which counts decide, so that there is something to bypass


def skewed_batch(generator: random.Random, tokens: int) -> Any:
    """Some experts are asked for far more often, so that strangers are worth less than they."""
    x, ids, weights = token_batch(generator.randrange(1 << 30), tokens)
    rows = []
    for _ in range(tokens):
        first = generator.choice([0, 1, 2, 3] if generator.random() < 0.7 else range(E))
        second = generator.choice([e for e in range(E) if e != first])
        rows.append([first, second])
    return x, torch.tensor(rows).view_as(ids), weights


def held(session: Any, layer: int, transfer: str) -> list[int]:
    """Expert of each slot, as the decoder's own table says."""
    if transfer == "gather":
        experts: list[int] = session.engine.cache.tables[layer].expert_of.tolist()
        return experts
    return list(session.engine._decoder._table.expert_of[layer])


# With late copies the host keeps slots that it does not know to be filled: by time, not by policy.
@pytest.mark.parametrize(
    ("transfer", "late"), [("gather", True), ("gather", False), ("copy", False)]
)
def test_slots_hold_what_the_python_policy_keeps(transfer: Any, late: bool) -> None:
    streams, generator = StreamModel(late=late), random.Random(1)
    expected = ExpertCache(num_experts=[E] * L, slots=[SLOTS] * L, policy="adaptive", spare=K)
    bypassed = misses = 0
    with opened(streams, slots=SLOTS) as session:
        session.configure(SessionOptions(transfer=transfer))
        for number in range(90):
            layer, tokens = number % L, 2 if number % 7 == 6 else 1
            batch = skewed_batch(generator, tokens)
            plan = expected.plan(layer, batch[1].reshape(-1).tolist())
            bypassed += len(plan.bypassed)
            misses += len(plan.fills) + len(plan.bypassed)
            out = session.experts(layer, *batch)
            torch.testing.assert_close(out, reference(MODULES[layer], *batch))
            streams.finish()
            assert held(session, layer, transfer) == list(expected.expert_of[layer]), number
        total = session.stats.total
    assert bypassed > 10, "else nothing is tested"
    assert total.misses == misses and total.demand_bytes == misses * RECORD
    assert not unordered_pairs(streams.ops)


def overlapping_steps(streams: StreamModel, transfer: Any) -> list[bool]:
    """Two layers are planned before the first is corrected: whether each comes out right."""
    generator = random.Random(3)
    with opened(streams, slots=SLOTS) as session:
        session.configure(SessionOptions(transfer=transfer))
        for number in range(WARM_UP * L):
            session.experts(number % L, *skewed_batch(generator, 1))
        right = []
        for seed in range(3):
            batches = [token_batch(seed + layer, 1) for layer in range(2)]
            # Strangers, one of which goes to a spare place.
            batches = [(x, torch.tensor([[6, 7]]), w) for x, _, w in batches]
            for layer, (_, ids, _) in enumerate(batches):
                session.wait_prefetch(0, layer, ids)
            partial = [session.run_resident_experts(n, *b, 0) for n, b in enumerate(batches)]
            for layer, batch in enumerate(batches):
                out = session.correct_experts(layer, partial[layer], *batch, 0)
                right.append(torch.allclose(out, reference(MODULES[layer], *batch), atol=1e-4))
            session.engine.forget_slots()  # type: ignore[attr-defined]
            for number in range(WARM_UP * L):
                session.experts(number % L, *skewed_batch(generator, 1))
    streams.finish()
    return right


@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_steps_that_overlap_do_not_share_the_spare_places(
    transfer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = StreamModel()
    assert all(overlapping_steps(streams, transfer))
    assert not unordered_pairs(streams.ops)
    monkeypatch.setattr(Decoder, "_spare_places", lambda decoder, layer: decoder._cache.spare)
    streams = StreamModel()
    assert not all(overlapping_steps(streams, transfer)) or unordered_pairs(streams.ops)


def test_a_step_that_was_never_corrected_leaves_nothing_on_its_way_to_a_spare_place() -> None:
    """Its record is still being read when another layer's step gets the place."""
    disk = Disk(slots=SLOTS)
    generator = random.Random(0)
    with disk.session as session:
        for number in range(WARM_UP * L):
            disk.check_layer(number % L, skewed_batch(generator, 1))
        session.wait_prefetch(0, 1, torch.tensor([[6, 7]]))  # and its step ends here
        for number in range(4 * L):
            layer = (1, 2, 0)[number % L]
            disk.check_layer(layer, (*token_batch(number, 1)[:1], torch.tensor([[6, 7]]),
                                     torch.tensor([[0.5, 0.5]])))  # fmt: skip
        disk.streams.finish()
        assert not unordered_pairs(disk.streams.ops)


@pytest.mark.parametrize(
    ("policy", "slots", "spare"),
    [("adaptive", SLOTS, K), ("adaptive", E, 0), ("lru", SLOTS, 0), ("lfu", SLOTS, 0)],
)
def test_spare_places_are_there_once_where_they_are_used(
    policy: Any, slots: int, spare: int
) -> None:
    with opened(StreamModel(), slots=slots, cache_policy=policy) as session:
        cache = session.engine.cache  # type: ignore[attr-defined]
        assert cache.spare == spare
        assert cache.total_bytes == (slots * L + spare) * RECORD
        assert [len(bank) for bank in cache.banks] == [slots] * L
        buffers = 0 if slots == E else 2 * E * RECORD
        assert session.stats.fast_tier_bytes == cache.total_bytes + buffers


def layouts(sizes: Sequence[int]) -> list[ExpertLayout]:
    return [ExpertLayout.from_shapes({"up_proj": ((n, 1024), torch.float32)}) for n in sizes]


def test_layers_with_records_of_one_size_share_their_spare_places() -> None:
    described, slots = layouts([1, 2, 1, 2]), [3, 4, 5, 2]
    cache = DeviceCache(described, [9] * 4, slots, torch.device("cpu"), spare=2)
    for layer, (bank, places) in enumerate(zip(cache.banks, cache.places, strict=True)):
        bank.fill_(layer + 1)
        assert bank.data_ptr() == places.data_ptr() and len(bank) == slots[layer]
    firsts = [places[first] for places, first in zip(cache.places, cache.spare_from, strict=True)]
    assert firsts[0].data_ptr() == firsts[2].data_ptr()
    assert firsts[1].data_ptr() == firsts[3].data_ptr()
    for layer, (bank, first) in enumerate(zip(cache.banks, firsts, strict=True)):
        assert (bank == layer + 1).all() and not first.any(), "no slot lies in another's"
    assert cache.total_bytes == sum(
        count * layout.record_bytes for count, layout in zip(slots, described, strict=True)
    ) + 2 * (described[0].record_bytes + described[1].record_bytes)
