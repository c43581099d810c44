"""The split path: exact whatever was predicted; approximate policies do what they say."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.errors import StoreError, TransferError
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.speculation import OFF_STEPS, TRIAL_STEPS, PrefetchGate
from specmoe_compile.runtime.speculation import SpeculationConfig as Config
from tests.runtime.fakes import (
    E,
    H,
    K,
    L,
    SlowStore,
    ram_store,
    reference,
    token_batch,
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
Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def session() -> Iterator[Session]:
    with make_session("half", store=SlowStore(ram_store(LAYERS))) as opened:
        opened.configure(Config(auto_off=False))
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


def hold_readers(session: Session) -> threading.Event:
    """Occupy every reader until the event is set."""
    blocked = threading.Event()
    session.store.before_read = lambda layer, expert: blocked.wait(10)  # type: ignore[attr-defined]
    assert session._transfer is not None
    session._transfer.start(2, [(e, torch.empty(RECORD, dtype=torch.uint8)) for e in range(4)])
    while len(reads(session)) < 4:
        time.sleep(0.001)
    return blocked


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


def reads(session: Session) -> list[tuple[int, int]]:
    store = session.store
    assert isinstance(store, SlowStore)
    return store.reads


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


def settled_vectors(session: Session) -> list[Tensor]:
    """Give a session default vectors to recognise."""
    tables = [torch.randn(E, H) for _ in range(L)]
    session.default_vectors.load(tables)
    return tables


@pytest.mark.parametrize("tokens", [1, 3])
def test_default_vector_policy_leaves_light_misses_out(session: Session, tokens: int) -> None:
    session.configure(Config(policy="default_vector", default_vector_threshold=0.3, auto_off=False))
    tables = settled_vectors(session)
    x, _, _ = token_batch(0, tokens)
    ids = torch.tensor([[0, 1], [1, 2], [3, 2]])[:tokens]
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2]])[:tokens]
    out = step(session, 0, (x, ids, weights), 0)
    assert session.stats.total.skipped_experts == 1
    fetched = {expert for _, expert in reads(session)}
    skipped = 1 if tokens == 1 else 2
    assert fetched == set(ids.flatten().tolist()) - {skipped}
    rows = exact_rows(x, ids)
    rows[ids == skipped] = tables[0][skipped]
    expected = (rows * weights.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(out, expected)


def test_default_vector_policy_uses_what_is_there(session: Session) -> None:
    session.configure(Config(policy="default_vector", default_vector_threshold=1.0, auto_off=False))
    settled_vectors(session)
    batch = token_batch(0, 1)
    session.experts(0, *batch)
    out = step(session, 0, batch, 0)
    assert torch.equal(out, reference(MODULES[0], *batch))
    assert session.stats.total.skipped_experts == 0


def exact_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Unweighted outputs [T, K, H] of layer 0."""
    ones = torch.ones(ids.shape[0], 1)
    columns = [reference(MODULES[0], x, ids[:, k : k + 1], ones) for k in range(ids.shape[1])]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_commit_runs_the_prediction(session: Session, tokens: int) -> None:
    session.configure(Config(policy="commit", auto_off=False))
    batch = x, _, _ = token_batch(0, tokens)
    guess, guess_weights = token_batch(9, tokens)[1:]
    out = step(session, 0, batch, session.start_prefetch(0, guess, guess_weights))
    assert torch.equal(out, reference(MODULES[0], x, guess, guess_weights))
    assert {e for _, e in reads(session)} == set(guess.flatten().tolist())


def test_commit_with_a_wide_prediction_runs_the_likeliest(session: Session) -> None:
    session.configure(Config(policy="commit", auto_off=False, prefetch_width=K))
    batch = x, _, _ = token_batch(0, 1)
    guess = torch.tensor([[5, 1, 7]])
    out = step(session, 0, batch, session.start_prefetch(0, guess, torch.tensor([[0.2, 0.3, 0.5]])))
    expected = reference(MODULES[0], x, torch.tensor([[7, 1]]), torch.tensor([[0.5, 0.3]]) / 0.8)
    torch.testing.assert_close(out, expected)


def test_commit_with_true_weights_renormalises_what_was_predicted(session: Session) -> None:
    session.configure(Config(policy="commit", commit_weights="true", auto_off=False))
    x = token_batch(0, 3)[0]
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    weights = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]])
    guess = torch.tensor([[0, 1], [3, 6], [6, 7]])
    guess_weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    out = step(session, 0, (x, ids, weights), session.start_prefetch(0, guess, guess_weights))
    executed = torch.tensor([[0, 1], [3, 3], [6, 7]])
    shares = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.2, 0.8]])
    torch.testing.assert_close(out, reference(MODULES[0], x, executed, shares))
    assert session.stats.total.skipped_experts == 3
    assert 2 not in {e for _, e in reads(session)}


def test_default_vector_policy_does_not_prefetch_what_it_would_not_fetch(session: Session) -> None:
    session.configure(Config(policy="default_vector", default_vector_threshold=0.3))
    session.start_prefetch(
        0, torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    )
    session.start_prefetch(
        1, torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    )
    assert [layer.prefetches for layer in session.stats.layers] == [3, 2, 0]


def test_commit_is_never_turned_off() -> None:
    with make_session("one_token") as session:
        session.configure(Config(policy="commit"))
        for token in range(3 * TRIAL_STEPS):
            batch = token_batch(token, 1)
            wrong = predict("wrong", batch, random.Random(0))
            out = step(session, 0, batch, session.start_prefetch(0, *wrong))
            assert torch.equal(out, reference(MODULES[0], batch[0], *wrong))


@pytest.mark.parametrize("width", [None, 0])
def test_commit_without_a_prediction_is_exact(session: Session, width: int | None) -> None:
    session.configure(Config(policy="commit"))
    batch = x, ids, weights = token_batch(0, 1)
    ticket = 0
    if width is not None:
        ticket = session.start_prefetch(0, ids[:, :width], weights[:, :width])
    assert torch.equal(step(session, 0, (x, ids, weights), ticket), reference(MODULES[0], *batch))


def test_commit_to_fewer_experts_than_the_router_uses(session: Session) -> None:
    session.configure(Config(policy="commit"))
    batch = x, _, _ = token_batch(0, 1)
    guess, share = torch.tensor([[6]]), torch.tensor([[0.7]])
    out = step(session, 0, batch, session.start_prefetch(0, guess, share))
    torch.testing.assert_close(out, reference(MODULES[0], x, guess, share))


def test_default_vectors_are_learned_from_both_paths() -> None:
    with make_session("half") as session:
        session.configure(Config(auto_off=False))
        x, ids, weights = token_batch(0, 40)
        session.experts(0, x, ids, weights)
        more = token_batch(1, 1)
        step(session, 0, more, 0)
        counts = torch.bincount(torch.cat((ids, more[1])).flatten(), minlength=E)
        assert torch.equal(session.default_vectors.counts[0], counts)
        rows = exact_rows(torch.cat((x, more[0])), torch.cat((ids, more[1])))
        mask = torch.cat((ids, more[1])) == 0
        torch.testing.assert_close(session.default_vectors.tables[0][0], rows[mask].mean(dim=0))
        blended = session.blend_default_vectors(0, more[1], more[2], more[0])
        expected = (session.default_vectors.tables[0][more[1]] * more[2].unsqueeze(-1)).sum(dim=1)
        torch.testing.assert_close(blended, expected)


def test_gate_closes_on_loss_and_tries_again() -> None:
    gate = PrefetchGate()
    for _ in range(TRIAL_STEPS):
        assert gate.admits()
        gate.measure(saved_ms=1.0, lost_ms=2.0)
    assert [gate.admits() for _ in range(OFF_STEPS + 1)] == [False] * OFF_STEPS + [True]
    for _ in range(TRIAL_STEPS):
        gate.measure(saved_ms=1.0, lost_ms=2.0)
    assert [gate.admits() for _ in range(2 * OFF_STEPS + 1)].count(False) == 2 * OFF_STEPS
    assert gate.closures == 2


def test_gate_stays_open_while_it_pays() -> None:
    gate = PrefetchGate()
    for _ in range(10 * TRIAL_STEPS):
        assert gate.admits()
        gate.measure(saved_ms=2.0, lost_ms=1.0)
    assert gate.closures == 0


@pytest.mark.parametrize(("saved_ms", "closures"), [(1.4, 1), (1.6, 0)])
def test_gate_with_a_margin_wants_more_than_it_costs(saved_ms: float, closures: int) -> None:
    gate = PrefetchGate(margin=1.5)
    for _ in range(TRIAL_STEPS):
        gate.measure(saved_ms=saved_ms, lost_ms=1.0)
    assert gate.closures == closures


def test_wrong_predictions_turn_a_layer_off() -> None:
    store = SlowStore(ram_store(LAYERS), delay_s=lambda: 0.001)
    with make_session("one_token", store=store) as session:
        session.configure(Config())
        generator = random.Random(0)
        for token in range(4 * TRIAL_STEPS):
            batch = token_batch(token, 1)
            wrong = predict("wrong", batch, generator)
            step(session, 0, batch, session.start_prefetch(0, *wrong))
        assert session.stats.layers[0].prefetches <= K * (TRIAL_STEPS + 1)
        assert session.stats.layers[0].needed < 4 * TRIAL_STEPS * K, "and is predicted no more"
        assert session.plan_step([0, 1], [1, 0]) == [False, False]


def test_right_predictions_keep_a_layer_on() -> None:
    store = SlowStore(ram_store(LAYERS), delay_s=lambda: 0.004)
    with make_session("one_token", store=store) as session:
        session.configure(Config())
        prefetches: list[Any] = []
        for token in range(3 * TRIAL_STEPS):
            batch = token_batch(token, 1)
            ticket = session.start_prefetch(0, *batch[1:])
            time.sleep(0.003)
            step(session, 0, batch, ticket)
            prefetches.append(session.stats.layers[0].prefetches)
        assert prefetches[-1] > prefetches[TRIAL_STEPS]


def test_only_the_rank_that_errs_is_turned_off() -> None:
    """The heaviest guess is always right, the lightest always wrong."""
    store = SlowStore(ram_store(LAYERS), delay_s=lambda: 0.004)
    with make_session("one_token", store=store) as session:
        session.configure(Config())
        for token in range(3 * TRIAL_STEPS):
            batch = _, ids, _ = token_batch(token, 1)
            wrong = next(e for e in range(E) if e not in ids[0].tolist())
            guess = torch.tensor([[int(ids[0, 0]), wrong]])
            ticket = session.start_prefetch(0, guess, torch.tensor([[0.9, 0.1]]))
            time.sleep(0.003)
            step(session, 0, batch, ticket)
        judge = session._speculator.judge
        heavy, light = judge.ranks[0]
        assert judge.layers[0].closures == 0
        assert heavy.closures == 0
        assert light.closures == 1
