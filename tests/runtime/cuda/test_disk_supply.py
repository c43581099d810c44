"""Experts on disk reach a device through a few page-locked buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specmoe_compile.errors import SpecMoEError, TransferError
from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda import opening
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.cuda.page_lock import PageLock
from specmoe_compile.runtime.cuda.supply import MIN_BUFFERS, StagedSupply
from specmoe_compile.system.aligned import aligned_empty
from tests.helpers import PATIENCE_S
from tests.runtime.cuda.fake_cudart import FakeCudart
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.fakes import (
    E,
    K,
    SlowStore,
    experts_layer,
    qwen_experts,
    ram_store,
    random_delays,
    reference,
    token_batch,
)

L = 3


class Disk:
    """A session over a slow store, with the modules that its experts come from."""

    def __init__(self, *, slots: int = E // 2, buffers: int = MIN_BUFFERS, seed: int = 0) -> None:
        self.modules = [qwen_experts(seed=index) for index in range(L)]
        layers = [experts_layer(index, module) for index, module in enumerate(self.modules)]
        self.store = SlowStore(ram_store(layers), delay_s=random_delays(seed))
        size = max(layout.record_bytes for layout in self.store.layouts)
        self.streams = StreamModel()
        self.supply = StagedSupply(
            self.store, aligned_empty(buffers * size), self.streams, reader_threads=2
        )
        self.session = open_cuda_session(
            layers,
            self.store,
            supply=self.supply,
            device=torch.device("cpu"),
            expert_cache_bytes=slots * sum(one.record_bytes for one in self.store.layouts),
            top_k=K,
            streams=self.streams,
            release=self.supply.close,
        )

    def check_layer(self, layer: int, batch: Any) -> None:
        out = self.session.experts(layer, *batch)
        torch.testing.assert_close(out, reference(self.modules[layer], *batch))


@pytest.fixture
def disk() -> Iterator[Disk]:
    opened = Disk()
    with opened.session:
        yield opened


@pytest.mark.parametrize("buffers", [MIN_BUFFERS, 9])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_outputs_are_those_of_the_modules(tokens: int, buffers: int) -> None:
    disk = Disk(buffers=buffers, slots=E - 1, seed=tokens)
    with disk.session:
        for seed in range(4):
            for layer in range(L):
                batch = token_batch(seed + layer, tokens)
                if layer + 1 < L:
                    _, ids, weights = token_batch(seed + layer + 1, tokens)
                    disk.session.start_prefetch(layer + 1, ids, weights)
                disk.check_layer(layer, batch)
        disk.streams.finish()
        assert not unordered_pairs(disk.streams.ops)
        assert disk.session.stats.store == "disk"
        if tokens == 1:
            assert disk.session.stats.total.prefetches > 0


def test_a_prompt_before_and_after_decoding(disk: Disk) -> None:
    for tokens in (20, 1, 20, 1):
        for layer in range(L):
            disk.check_layer(layer, token_batch(tokens, tokens))


def test_what_is_there_runs_before_what_is_read(disk: Disk) -> None:
    batch = token_batch(0, 1)
    disk.check_layer(0, batch)
    wanted = {int(expert) for expert in batch[1].reshape(-1)}
    other = next(expert for expert in range(E) if expert not in wanted)
    ids = torch.tensor([[int(batch[1][0, 0]), other]])
    held = threading.Event()
    disk.store.before_read = lambda layer, expert: held.wait(PATIENCE_S)  # type: ignore[assignment, return-value]
    state = disk.session.wait_prefetch(-1, 0, ids)
    partial = disk.session.run_resident_experts(0, batch[0], ids, batch[2], state)
    held.set()
    out = disk.session.correct_experts(0, partial, batch[0], ids, batch[2], state)
    torch.testing.assert_close(out, reference(disk.modules[0], batch[0], ids, batch[2]))


def test_a_read_that_fails_is_one_error_and_the_session_goes_on(disk: Disk) -> None:
    def fail(layer: int, expert: int) -> None:
        raise OSError("the disk is gone")

    disk.store.before_read = fail
    for batch in (token_batch(0, 1), token_batch(0, 20)):
        with pytest.raises(TransferError, match="the disk is gone"):
            disk.session.experts(0, *batch)
    disk.store.before_read = lambda layer, expert: None
    for seed in range(4):
        disk.check_layer(0, token_batch(seed, 1))
        disk.check_layer(0, token_batch(seed, 20))


def test_a_guess_that_cannot_be_read_is_no_error_until_it_is_needed(disk: Disk) -> None:
    _, ids, weights = token_batch(1, 1)

    def fail(layer: int, expert: int) -> None:
        raise OSError("the disk is gone")

    disk.store.before_read = fail
    for _ in range(3):  # the model of streams gives the host its ids at the third question
        disk.session.start_prefetch(1, ids, weights)
    disk.store.before_read = lambda layer, expert: None
    disk.check_layer(0, token_batch(0, 1))
    disk.check_layer(1, token_batch(1, 1))


def test_the_gpu_cannot_read_a_disk(disk: Disk) -> None:
    assert disk.session.engine.transfer == "copy"
    for config in (SessionOptions(transfer="gather"), SessionOptions(mode="reduce-overhead")):
        with pytest.raises(SpecMoEError, match="load the model with store='ram'"):
            disk.session.configure(config)
    disk.session.configure(SessionOptions())
    assert disk.session.engine.transfer == "copy"


def test_closing_ends_the_readers_and_unlocks_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeCudart()
    monkeypatch.setattr(
        opening,
        "PageLock",
        lambda region: PageLock(region, runtime=runtime, synchronize=runtime.synchronize),
    )
    monkeypatch.setattr(opening, "CudaStreams", lambda device: StreamModel())
    modules = torch.nn.ModuleList(qwen_experts(seed=index) for index in range(L))
    layers = [experts_layer(index, module) for index, module in enumerate(modules)]
    store = SlowStore(ram_store(layers))
    before = _readers()  # sessions of other tests may still have theirs
    session = opening.open_device_session(
        modules,
        layers,
        store,
        expert_cache_bytes=1,
        cache_policy="lru",
        top_k=K,
        reader_threads=2,
    )
    assert len(_readers() - before) == 2
    (locked,) = runtime.locked.values()
    assert locked == 8 * store.layouts[0].record_bytes
    batch = token_batch(0, 1)
    torch.testing.assert_close(session.experts(0, *batch), reference(modules[0], *batch))
    session.close()
    assert runtime.locked == {}
    assert store.closed
    assert not _readers() - before


def _readers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("specmoe-reader")}
