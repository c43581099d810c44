"""One layer step through the split path, and predictions of several kinds; for tests."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.session import Session
from tests.helpers import PATIENCE_S
from tests.runtime.fakes import E, H, K, SlowStore, ram_store
from tests.runtime.test_session import LAYERS, RECORD, make_session

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(name="session")
def open_session() -> Iterator[Session]:
    with make_session("half", store=SlowStore(ram_store(LAYERS))) as opened:
        opened.configure(SessionOptions(auto_off=False))
        yield opened


def step(session: Session, layer: int, batch: Batch, ticket: int) -> Tensor:
    """One layer through the split path."""
    x, ids, weights = batch
    state = session.wait_prefetch(ticket, layer, ids)
    partial = session.run_resident_experts(layer, x, ids, weights, state)
    assert partial.shape == (*ids.shape, H)
    before = partial.clone()
    out = session.correct_experts(layer, partial, x, ids, weights, state)
    assert torch.equal(partial.view(torch.int32), before.view(torch.int32)), "wrote its argument"
    return out


def predict(kind: str, batch: Batch, generator: random.Random) -> tuple[Tensor, Tensor]:
    """A prediction, ids and weights [T, P], of one batch."""
    _, ids, weights = batch
    if kind == "wrong":
        rows = [[e for e in range(E) if e not in row][:K] for row in ids.tolist()]
        return torch.tensor(rows).view(-1, K), weights
    if kind == "random":
        rows = [generator.sample(range(E), K) for _ in ids]
        return torch.tensor(rows).view(-1, K), weights
    if kind == "empty":
        return ids[:, :0], weights[:, :0]
    if kind == "wide":
        rest = [[e for e in range(E) if e not in row] for row in ids.tolist()]
        wide = torch.cat((ids, torch.tensor(rest)), dim=1)
        return wide, torch.rand(wide.shape)
    return ids, weights


def hold_readers(session: Session) -> threading.Event:
    """Occupy every reader until the event is set."""
    blocked = threading.Event()
    session.store.before_read = lambda layer, expert: blocked.wait(PATIENCE_S)  # type: ignore[attr-defined]
    assert session.engine.transfer is not None
    session.engine.transfer.start(
        2, [(e, torch.empty(RECORD, dtype=torch.uint8)) for e in range(4)]
    )
    while len(reads(session)) < 4:
        time.sleep(0.001)
    return blocked


def reads(session: Session) -> list[tuple[int, int]]:
    store = session.store
    assert isinstance(store, SlowStore)
    return store.reads
