"""Approximate policies: what becomes of a miss, and when a step stays exact all the same."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from specmoe_compile.options import SessionOptions as Config
from specmoe_compile.runtime.policy.amount import TRIAL_STEPS
from specmoe_compile.runtime.session import Session
from tests.runtime.fakes import E, H, K, L, reference, token_batch
from tests.runtime.split_path import open_session, predict, reads, step  # noqa: F401
from tests.runtime.test_session import MODULES, make_session


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
