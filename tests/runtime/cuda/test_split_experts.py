"""A rank's part of the experts on a device: the id E is another rank's and costs nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cpu.engine import open_session as open_cpu_session
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.session import Session
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.fakes import E, K, L, ram_store, token_batch
from tests.runtime.split_path import predict, step
from tests.runtime.test_session import LAYERS, RECORD

SPLIT = [replace(layer, is_slice=True) for layer in LAYERS]
Batch = tuple[Tensor, Tensor, Tensor]


def part_of(batch: Batch, generator: random.Random) -> Batch:
    """The batch as a rank sees it: some choices, or all of a token, are other ranks'."""
    x, ids, weights = batch
    rows = [[generator.random() < 0.5 for _ in row] for row in ids.tolist()]
    foreign = torch.tensor(rows, dtype=torch.bool).view(ids.shape)
    if generator.random() < 0.2:
        foreign[:] = True
    return x, torch.where(foreign, E, ids), torch.where(foreign, 0.0, weights)


def guessed(
    kind: str, whole: Batch, part: Batch, generator: random.Random
) -> tuple[Tensor, Tensor]:
    """A prediction for a part: of the whole batch, some of it other ranks'."""
    if kind == "right":
        return part[1], part[2]
    _, ids, weights = part_of((whole[0], *predict(kind, whole, generator)), generator)
    return ids, weights


@pytest.fixture
def streams() -> StreamModel:
    return StreamModel()


@pytest.fixture(params=["gather", "copy"])
def device(request: pytest.FixtureRequest, streams: StreamModel) -> Iterator[Session]:
    with open_cuda_session(
        SPLIT,
        ram_store(LAYERS),
        device=torch.device("cpu"),
        expert_cache_bytes=(E // 2) * L * RECORD,
        top_k=K,
        streams=streams,
    ) as session:
        session.configure(SessionOptions(transfer=request.param))
        yield session


def reference(batch: Batch, layer: int) -> Tensor:
    """The same with the plain sum over a rank's own experts."""
    x, ids, weights = batch
    with open_cpu_session(LAYERS, ram_store(LAYERS), expert_cache_bytes=None, top_k=K) as whole:
        own = torch.where(ids == E, 0, ids)
        return whole.experts(layer, x, own, weights)


@pytest.mark.parametrize("kind", ["demand", "right", "wrong", "wide", "empty"])
def test_a_step_computes_its_own_experts_and_fetches_no_others(
    device: Session, streams: StreamModel, kind: str
) -> None:
    generator = random.Random(kind)
    device.reset_stats()
    needed = 0
    for number in range(12):
        tokens = (1, 1, 2, 4, 40)[number % 5]
        whole = token_batch(number, tokens)
        batch = part_of(whole, generator)
        layer = number % L
        if kind == "demand":
            out = device.experts(layer, *batch)
        else:
            ticket = device.start_prefetch(layer, *guessed(kind, whole, batch, generator))
            out = step(device, layer, batch, ticket)
        streams.finish()
        torch.testing.assert_close(out, reference(batch, layer))
        if tokens <= 2:  # more pass by the slots
            needed += len({e for e in batch[1].reshape(-1).tolist() if e != E})
    total = device.stats.total
    assert total.hits + total.misses == needed, "another rank's expert was asked for"
    assert not unordered_pairs(streams.ops)


def test_a_step_without_experts_of_its_own_is_zero(device: Session, streams: StreamModel) -> None:
    device.reset_stats()
    for tokens in (1, 3, 40):
        x, ids, weights = token_batch(0, tokens)
        out = device.experts(0, x, torch.full_like(ids, E), torch.zeros_like(weights))
        streams.finish()
        assert not out.any() and out.shape == x.shape
    total = device.stats.total
    assert (total.hits, total.misses, total.prefetches) == (0, 0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "default_vector", "default_vector_threshold": 0.6},
        {"policy": "commit"},
        {"policy": "commit", "commit_weights": "true"},
    ],
    ids=["default_vector", "commit", "commit_true"],
)
def test_policies_leave_other_ranks_experts_out(
    device: Session, streams: StreamModel, options: dict[str, Any]
) -> None:
    transfer = device.speculation.transfer
    device.configure(SessionOptions(transfer=transfer, **options))
    generator = random.Random(0)
    for number in range(20):
        whole = token_batch(number, 1 + number % 3)
        batch = part_of(whole, generator)
        kind = ("right", "wide", "random")[number % 3]
        ticket = device.start_prefetch(1, *guessed(kind, whole, batch, generator))
        before = device.stats.total.skipped_experts
        out = step(device, 1, batch, ticket)
        streams.finish()
        assert bool(torch.isfinite(out).all())
        own = int((batch[1] != E).sum())
        assert device.stats.total.skipped_experts - before <= own
        if own == 0 and options["policy"] == "default_vector":
            assert not out.any()


def test_default_vectors_of_other_ranks_stay_zero(device: Session, streams: StreamModel) -> None:
    generator = random.Random(1)
    for number in range(6):
        device.experts(0, *part_of(token_batch(number, (2, 40)[number % 2]), generator))
    streams.finish()
    vectors = device.default_vectors
    assert vectors.tables[0].shape[0] == E + 1
    assert not vectors.tables[0][E].any() and int(vectors.counts[0][E]) == 0
    assert vectors.counts[0][:E].sum() > 0
    ids = torch.tensor([[E, 1]])
    like = torch.zeros(1, vectors.tables[0].shape[1])
    blended = vectors.blend(0, ids, torch.tensor([[0.5, 1.0]]), like)
    torch.testing.assert_close(blended[0], vectors.tables[0][1])
