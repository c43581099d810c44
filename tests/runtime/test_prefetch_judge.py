"""What does not pay is turned off: gates, the judge's arithmetic, and both in a session."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specmoe_compile.options import SessionOptions as Config
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.policy.amount import OFF_STEPS, TRIAL_STEPS, PrefetchGate
from specmoe_compile.runtime.policy.prefetch_judge import PrefetchJudge
from specmoe_compile.runtime.transfer.base import CANCELLED, DONE, QUEUED, RUNNING, Issued, Read
from tests.runtime.fakes import (
    E,
    K,
    SlowStore,
    let_waits_last,
    ram_store,
    token_batch,
    wait_until_reads_began,
)
from tests.runtime.split_path import predict, step
from tests.runtime.test_session import LAYERS, make_session


def test_gate_closes_on_loss_and_tries_again() -> None:
    gate = PrefetchGate()
    for _ in range(TRIAL_STEPS):
        assert gate.admits()
        gate.measure(useful=1, useless=2)
    assert [gate.admits() for _ in range(OFF_STEPS + 1)] == [False] * OFF_STEPS + [True]
    for _ in range(TRIAL_STEPS):
        gate.measure(useful=1, useless=2)
    assert [gate.admits() for _ in range(2 * OFF_STEPS + 1)].count(False) == 2 * OFF_STEPS


def test_gate_stays_open_while_it_pays() -> None:
    gate = PrefetchGate()
    for _ in range(10 * TRIAL_STEPS):
        assert gate.admits()
        gate.measure(useful=2, useless=1)
    assert gate.is_open


def test_wrong_predictions_turn_a_layer_off() -> None:
    with make_session("one_token", store=SlowStore(ram_store(LAYERS))) as session:
        session.configure(Config())
        generator = random.Random(0)
        for token in range(4 * TRIAL_STEPS):
            batch = token_batch(token, 1)
            wrong = predict("wrong", batch, generator)
            ticket = session.start_prefetch(0, *wrong)
            wait_until_reads_began(session)  # what has not begun costs nothing
            step(session, 0, batch, ticket)
        assert session.stats.layers[0].prefetches <= K * (TRIAL_STEPS + 1)
        assert session.stats.layers[0].needed < 4 * TRIAL_STEPS * K, "and is predicted no more"
        assert session.plan_step([0, 1], [1, 0], torch.tensor([[0, 1]])) == [False, False]


def test_right_predictions_keep_a_layer_on() -> None:
    with make_session("one_token", store=SlowStore(ram_store(LAYERS))) as session:
        session.configure(Config())
        prefetches: list[Any] = []
        for token in range(3 * TRIAL_STEPS):
            batch = token_batch(token, 1)
            ticket = session.start_prefetch(0, *batch[1:])
            wait_until_reads_began(session)
            step(session, 0, batch, ticket)
            prefetches.append(session.stats.layers[0].prefetches)
        assert prefetches[-1] > prefetches[TRIAL_STEPS]


def test_only_the_rank_that_errs_is_turned_off() -> None:
    """The heaviest guess is always right, the lightest always wrong."""
    with make_session("one_token", store=SlowStore(ram_store(LAYERS))) as session:
        session.configure(Config())
        was_off: set[int] = set()
        token = 0
        # A guess that is cached says nothing, and what is depends on which read ended first: the
        # wrong ones change, so that no expert stays that is guessed again and again.
        while not was_off and token < 10 * TRIAL_STEPS:
            batch = _, ids, _ = token_batch(token, 1)
            token += 1
            unwanted = [expert for expert in range(E) if expert not in ids[0].tolist()]
            wrong = unwanted[token % len(unwanted)]
            guess = torch.tensor([[int(ids[0, 0]), wrong]])
            ticket = session.start_prefetch(0, guess, torch.tensor([[0.9, 0.1]]))
            wait_until_reads_began(session)
            step(session, 0, batch, ticket)
            gates = session.engine.judge.ranks[0]
            was_off.update(rank for rank, gate in enumerate(gates) if not gate.is_open)
        assert was_off == {1}


def judged(*prefetches: Sequence[tuple[int, int]], wanted: set[int], steps: int) -> PrefetchJudge:
    """A judge after steps that each read these guesses ahead, as (expert, state), in turn."""
    judge = PrefetchJudge(1)
    for step_number in range(steps):
        guesses = prefetches[step_number % len(prefetches)]
        admitted, ranks = judge.admitted(0, [expert for expert, _ in guesses], len(guesses))
        reads = {}
        for expert, state in guesses:
            if expert in admitted:
                read = Read(0, expert, torch.empty(0, dtype=torch.uint8), speculative=True)
                read.state = state
                reads[expert] = read
        judge.measure(0, Issued(reads, []), ranks, wanted)
    return judge


def test_a_guess_that_never_began_says_nothing() -> None:
    judge = judged([(3, CANCELLED)], [(3, QUEUED)], wanted=set(), steps=4 * TRIAL_STEPS)
    assert judge.ranks[0][0].is_open
    judge = judged([(3, RUNNING)], [(3, DONE)], wanted=set(), steps=TRIAL_STEPS)
    assert not judge.ranks[0][0].is_open


@pytest.mark.parametrize(("right", "is_open"), [(1, True), (0, False)])
def test_more_guesses_have_to_be_right_than_wrong(right: int, is_open: bool) -> None:
    turns = [[(3, DONE)], [(4, DONE)], [(5 - right, DONE)]]
    judge = judged(*turns, wanted={4}, steps=3 * TRIAL_STEPS)
    assert judge.ranks[0][0].is_open == is_open


def test_a_layer_none_of_whose_ranks_is_read_is_not_predicted() -> None:
    judge = judged([(3, DONE), (5, DONE)], wanted=set(), steps=TRIAL_STEPS)
    assert not any(gate.is_open for gate in judge.ranks[0])
    asked = [judge.predicts(0) for _ in range(OFF_STEPS + 1)]
    assert asked == [False] * OFF_STEPS + [True]


def test_a_session_remembers_when_it_waited() -> None:
    with make_session("one_token", store=SlowStore(ram_store(LAYERS))) as session:
        let_waits_last(session, 0.25)
        session.experts(0, *token_batch(0, 1))
        assert session.stats.layers[0].stall_ms == 250.0
        assert isinstance(session.engine.residency, CachedResidency)
        stalled_s = session.engine.residency._stalled_s
        assert (stalled_s(-1.0, 1.0), stalled_s(0.125, 1.0)) == (0.25, 0.125)
        assert stalled_s(-1.0, 0.0) == stalled_s(0.25, 1.0) == 0.0
