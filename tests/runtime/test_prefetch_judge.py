"""What does not pay is turned off: gates, the judge's arithmetic, and both in a session."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specmoe_compile.runtime.prefetch_judge import PrefetchJudge
from specmoe_compile.runtime.residency import InPlaceResidency, Issued
from specmoe_compile.runtime.speculation import OFF_STEPS, TRIAL_STEPS, PrefetchGate
from specmoe_compile.runtime.speculation import SpeculationConfig as Config
from specmoe_compile.runtime.transfer.base import DONE, Read
from tests.runtime.fakes import E, K, SlowStore, ram_store, token_batch
from tests.runtime.split_path import predict, step
from tests.runtime.test_session import LAYERS, make_session


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
    gate = PrefetchGate()
    for _ in range(TRIAL_STEPS):
        gate.measure(saved_ms=saved_ms, lost_ms=1.0, margin=1.5)
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


class TimedResidency(InPlaceResidency):
    """A residency whose clock stands still and whose waits the test sets."""

    def __init__(self, now_s: float, stall: tuple[float, float]) -> None:
        self._now_s = now_s
        self._stall = stall

    def now_s(self) -> float:
        return self._now_s

    def stalled_s(self, start_s: float, end_s: float) -> float:
        return max(0.0, min(end_s, self._stall[1]) - max(start_s, self._stall[0]))


def judged(
    stall: tuple[float, float], *, wanted: set[int], host_ms: float = 0.0
) -> tuple[int, int]:
    """Closures of a layer and of its only rank, for a guess read from second 10 to second 14."""
    residency = TimedResidency(15.0, stall)
    judge = PrefetchJudge(1, residency.now_s)
    for _ in range(TRIAL_STEPS):
        admitted, ranks = judge.admitted(0, [3], 1)
        read = Read(0, 3, torch.empty(0, dtype=torch.uint8), speculative=True)
        read.state, read.started_s, read.finished_s = DONE, 10.0, 14.0
        issued = Issued({3: read} if admitted else {}, [])
        judge.measure(0, issued, ranks, wanted, host_ms=host_ms, residency=residency)
    return judge.layers[0].closures, judge.ranks[0][0].closures


@pytest.mark.parametrize(
    ("stall", "closed"),
    [
        pytest.param((0.0, 9.0), False, id="no wait beside it"),
        pytest.param((9.0, 12.0), False, id="half of it beside a wait"),
        pytest.param((9.0, 15.0), True, id="all of it beside a wait"),
    ],
)
def test_a_read_beside_a_wait_saves_nothing(stall: tuple[float, float], closed: bool) -> None:
    assert judged(stall, wanted={3}, host_ms=1000.0) == (closed, 0)


def test_a_useless_read_beside_a_wait_costs() -> None:
    assert judged((0.0, 9.0), wanted=set()) == (0, 0), "nobody waited for it"
    assert judged((12.0, 13.0), wanted=set()) == (0, 1), "the rank that errs goes first"


@pytest.mark.parametrize(("missed", "closures"), [(0, 1), (1, 0)])
def test_a_layer_that_seldom_lacks_an_expert_has_to_save_more(missed: int, closures: int) -> None:
    """Every second step a read saves 4 s, each prediction costs 1 s: twice its cost is saved."""

    class Lacking(TimedResidency):
        def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
            return [7] * missed

    residency = Lacking(15.0, (0.0, 9.0))
    judge = PrefetchJudge(1, residency.now_s)
    for place in range(TRIAL_STEPS):
        _, ranks = judge.admitted(0, [3], 1)
        read = Read(0, 3, torch.empty(0, dtype=torch.uint8), speculative=True)
        read.state, read.started_s, read.finished_s = DONE, 10.0, 14.0
        issued = Issued({3: read} if place % 2 else {}, [])
        judge.measure(0, issued, ranks, {3}, host_ms=1000.0, residency=residency)
    assert judge.layers[0].closures == closures


def test_a_session_remembers_when_it_waited() -> None:
    store = SlowStore(ram_store(LAYERS), delay_s=lambda: 0.005)
    with make_session("one_token", store=store) as session:
        before_s = session._residency.now_s()
        session.experts(0, *token_batch(0, 1))
        after_s = session._residency.now_s()
        waited_ms = session.stats.layers[0].stall_ms
        assert waited_ms > 0.0
        stalled_s = session._residency.stalled_s
        assert stalled_s(before_s, after_s) == pytest.approx(waited_ms / 1e3)
        assert stalled_s(0.0, before_s) == stalled_s(after_s, after_s + 1.0) == 0.0
