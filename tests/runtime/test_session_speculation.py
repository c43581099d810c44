"""The split path of a session: exact whatever was predicted, and demand before speculation."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from specmoe_compile.errors import StoreError, TransferError
from specmoe_compile.options import SessionOptions as Config
from specmoe_compile.runtime.session import Session
from tests.helpers import PATIENCE_S
from tests.runtime.fakes import (
    K,
    L,
    SlowStore,
    ram_store,
    reference,
    token_batch,
    wait_until_reads_began,
)
from tests.runtime.split_path import (  # noqa: F401
    hold_readers,
    open_session,
    predict,
    reads,
    step,
)
from tests.runtime.test_session import (
    CACHES,
    LAYERS,
    MODULES,
    RECORD,
    in_time,
    make_session,
    poison,
)

PREDICTORS = ["right", "wrong", "random", "empty", "wide", "late", "absent"]


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lookahead", [1, 2])
def test_exact_policy_is_exact_for_any_prediction(cache: str, kind: str, lookahead: int) -> None:
    """Random streams through layers as a model runs them, with slots poisoned when they change."""
    generator = random.Random(f"{cache}{kind}{lookahead}")
    with make_session(cache) as session:
        session.configure(Config(lookahead=lookahead, auto_off=False))
        if cache != "in_place":
            poison(session)
        for token in range(25):
            tokens = generator.choice([1, 1, 1, 1, 2, 4, 20])
            batches = [token_batch(100 * token + layer, tokens) for layer in range(L)]
            tickets: dict[int, int] = {}
            for layer in range(L):
                ahead = layer + lookahead
                if ahead < L and kind != "absent":
                    guess = predict(kind, batches[ahead], generator)
                    tickets[ahead] = session.start_prefetch(ahead, *guess)
                if generator.random() < 0.1:
                    out = session.experts(layer, *batches[layer])
                elif kind == "late" and layer in tickets:
                    out = step(session, layer, batches[layer], tickets[layer] + 1000)
                else:
                    out = step(session, layer, batches[layer], tickets.get(layer, -1))
                assert torch.equal(out, reference(MODULES[layer], *batches[layer]))
        total = session.stats.total
        assert total.steps == 25 * L
        used = total.useful_speculative_bytes + total.wasted_speculative_bytes
        assert 0 <= used <= total.speculative_bytes


@pytest.mark.parametrize("cache", ["double_buffers", "one_token", "half"])
def test_reader_errors_on_the_split_path_never_hang_or_corrupt(cache: str) -> None:
    generator = random.Random(cache)
    with make_session(cache) as session:
        session.configure(Config(auto_off=False))
        poison(session)

        def fail(layer: int, expert: int) -> None:
            if generator.random() < 0.15:
                raise StoreError("unreadable")

        session.store.before_read = fail  # type: ignore[attr-defined]
        failures = 0
        for token in range(60):
            layer, batch = token % L, token_batch(token, generator.choice([1, 1, 3, 20]))
            kind = generator.choice(PREDICTORS)
            ticket = session.start_prefetch(layer, *predict(kind, batch, generator))
            try:
                out = in_time(lambda i=layer, b=batch, t=ticket: step(session, i, b, t))
            except TransferError:
                failures += 1
                continue
            assert torch.equal(out, reference(MODULES[layer], *batch))
        assert 0 < failures < 60


def test_right_prediction_reads_nothing_on_demand(session: Session) -> None:
    batch = token_batch(0, 1)
    ticket = session.start_prefetch(0, *batch[1:])
    step(session, 0, batch, ticket)
    layer = session.stats.layers[0]
    assert (layer.misses, layer.hits, layer.demand_bytes) == (0, K, 0)
    assert layer.speculative_bytes == layer.useful_speculative_bytes == K * RECORD
    assert (layer.recalled, layer.needed, layer.recall) == (K, K, 1.0)


def test_wrong_prediction_is_taken_back_before_it_starts(session: Session) -> None:
    batch = x, ids, weights = token_batch(0, 1)
    wrong = predict("wrong", batch, random.Random(0))
    blocked = hold_readers(session)
    ticket = session.start_prefetch(0, *wrong)
    state = session.wait_prefetch(ticket, 0, ids)
    layer = session.stats.layers[0]
    assert layer.speculative_bytes == 0
    assert layer.cancelled_prefetches == K
    assert (layer.recalled, layer.needed) == (0, K)
    blocked.set()
    partial = session.run_resident_experts(0, x, ids, weights, state)
    out = in_time(lambda: session.correct_experts(0, partial, x, ids, weights, state))
    assert torch.equal(out, reference(MODULES[0], *batch))
    assert {expert for layer, expert in reads(session) if layer == 0} == set(ids[0].tolist())


def test_experts_that_made_room_for_a_cancelled_guess_are_still_there() -> None:
    generator = random.Random(0)
    with make_session("one_token", store=SlowStore(ram_store(LAYERS))) as session:
        session.configure(Config())
        batch = x, ids, weights = token_batch(0, 1)
        step(session, 0, batch, -1)
        blocked = hold_readers(session)
        ticket = session.start_prefetch(0, *predict("wrong", batch, generator))
        assert (
            session.engine.cache is not None and session.engine.cache.slot(0, int(ids[0, 0])) == -1
        )
        state = session.wait_prefetch(ticket, 0, ids)
        partial = session.run_resident_experts(0, x, ids, weights, state)
        out = in_time(lambda: session.correct_experts(0, partial, x, ids, weights, state))
        blocked.set()
        assert torch.equal(out, reference(MODULES[0], *batch))
        layer = session.stats.layers[0]
        assert (layer.hits, layer.misses, layer.cancelled_prefetches) == (K, K, K)
        assert layer.pushed_out_bytes == layer.speculative_bytes == 0


@pytest.mark.parametrize("cache", ["one_token", "half"])
def test_slots_that_are_given_back_hold_what_they_say(cache: str) -> None:
    """Without poison, which would spoil them; a slow reader, so that guesses are cancelled."""
    generator, read = random.Random(cache), threading.Event()
    store = SlowStore(ram_store(LAYERS))
    store.before_read = lambda layer, expert: read.wait(PATIENCE_S) and None
    with make_session(cache, store=store, reader_threads=1) as session:
        session.configure(Config(auto_off=False))
        for token in range(60):
            for layer in range(L):
                batch = token_batch(7 * token + layer, generator.choice([1, 1, 2]))
                kind = generator.choice(["wrong", "random", "wide"])
                if generator.random() < 0.5:
                    read.clear()
                ticket = session.start_prefetch(layer, *predict(kind, batch, generator))
                x, ids, weights = batch
                state = session.wait_prefetch(ticket, layer, ids)
                partial = session.run_resident_experts(layer, x, ids, weights, state)
                read.set()
                out = session.correct_experts(layer, partial, x, ids, weights, state)
                assert torch.equal(out, reference(MODULES[layer], *batch))
        assert session.stats.total.cancelled_prefetches > 0, "else nothing is tested"


def test_what_useless_guesses_push_out_is_counted_when_it_is_read_again() -> None:
    generator = random.Random(0)
    with make_session("one_token", store=SlowStore(ram_store(LAYERS))) as session:
        session.configure(Config())
        batch = token_batch(0, 1)
        step(session, 0, batch, -1)
        ticket = session.start_prefetch(0, *predict("wrong", batch, generator))
        wait_until_reads_began(session)
        step(session, 0, batch, ticket)
        assert session.stats.layers[0].pushed_out_bytes == K * RECORD


def test_budget_limits_speculative_bytes(session: Session) -> None:
    session.configure(Config(prefetch_budget_bytes=2 * RECORD - 1, auto_off=False))
    x, ids, weights = token_batch(0, 1)
    ids, weights = ids.flip(1), torch.tensor([[0.2, 0.8]])
    session.start_prefetch(0, ids, weights)
    assert session.stats.total.speculative_bytes == RECORD
    session.experts(0, x, ids, weights)
    assert reads(session)[0] == (0, int(ids[0, 1])), "the likeliest expert goes first"
    session.configure(Config(prefetch_budget_bytes=0, auto_off=False))
    session.start_prefetch(1, ids, weights)
    assert session.stats.layers[1].speculative_bytes == 0


def test_width_limits_prefetched_experts(session: Session) -> None:
    session.configure(Config(prefetch_width=1, auto_off=False))
    _, ids, _ = token_batch(0, 1)
    session.start_prefetch(0, ids, torch.tensor([[0.3, 0.7]]))
    assert session.stats.layers[0].prefetches == 1


def test_skipped_layers_do_not_speculate(session: Session) -> None:
    session.configure(Config(skip_layers=(1,), auto_off=False))
    batch = token_batch(0, 1)
    for layer in range(L):
        step(session, layer, batch, session.start_prefetch(layer, *batch[1:]))
    assert [layer.prefetches for layer in session.stats.layers] == [K, 0, K]
    assert session.stats.layers[1].needed == 0


def test_prefill_is_never_predicted(session: Session) -> None:
    session.configure(Config(policy="commit", auto_off=False))
    batch = token_batch(0, 40)
    wrong = predict("wrong", batch, random.Random(0))
    out = step(session, 0, batch, session.start_prefetch(0, *wrong))
    assert torch.equal(out, reference(MODULES[0], *batch))
    assert session.stats.total.speculative_bytes == 0


def test_demand_reads_go_before_speculative_ones(session: Session) -> None:
    blocked = hold_readers(session)
    session.start_prefetch(1, *token_batch(1, 1)[1:])
    batch = token_batch(0, 1)
    state = session.wait_prefetch(0, 0, batch[1])
    blocked.set()
    x, ids, weights = batch
    partial = session.run_resident_experts(0, x, ids, weights, state)
    session.correct_experts(0, partial, x, ids, weights, state)
    order = [layer for layer, _ in reads(session)[4:]]
    assert order[:K] == [0] * K


def test_ops_run_twice_give_the_same(session: Session) -> None:
    batch = x, ids, weights = token_batch(0, 2)
    expected = reference(MODULES[0], *batch)
    ticket = session.start_prefetch(0, ids, weights)
    states = [session.wait_prefetch(ticket, 0, ids) for _ in range(2)]
    partials = [session.run_resident_experts(0, x, ids, weights, states[1]) for _ in range(2)]
    for partial in partials:
        for state in states:
            out = session.correct_experts(0, partial, x, ids, weights, state)
            assert torch.equal(out, expected)


def test_steps_on_demand_learn_default_vectors_seldom(session: Session) -> None:
    """One layer per step where layers are split, one in four steps where they are not."""
    batch = token_batch(0, 1)
    counts = session.default_vectors.counts
    for index in range(12 * (L + 1)):
        step(session, index % L, batch, 0)
    assert [int(layer.sum()) for layer in counts] == [4 * K] * L
    for index in range(12 * (4 * L + 1)):
        session.experts(index % L, *batch)
    assert [int(layer.sum()) for layer in counts] == [8 * K] * L
