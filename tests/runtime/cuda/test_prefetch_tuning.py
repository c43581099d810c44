"""How many records a device prefetches is found by trying, where that may be found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.tune_prefetch.op import tune_prefetch
from specmoe_compile.kernels.tune_prefetch.reference import (
    BLOCK_STEPS,
    HOLD,
    LAST,
    ROUND,
    ROUNDS,
    SHORTEST,
)
from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda import prefetch_budget
from specmoe_compile.runtime.cuda.host_trial import HostTrial
from specmoe_compile.runtime.cuda.prefetch_budget import amounts_to_try
from specmoe_compile.runtime.cuda.step_trial import COMPARED_STEPS, WARM_STEPS
from specmoe_compile.runtime.session import Session
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.stream_model import StreamModel


@contextmanager
def opened(**options: Any) -> Iterator[Session]:
    _model, session = on_device(tiny_qwen3_moe(layers=3), StreamModel(late=False), slots=7)
    with session:
        session.configure(SessionOptions(**{"transfer": "gather", **options}))
        yield session


def one_step(session: Session, experts: tuple[int, int]) -> list[int]:
    """Prefetch layers 1 and 2, then empty the slots' plans; returns records that came ahead."""
    before = [layer.prefetches for layer in session.stats.layers]
    decoder: Any = session.engine._decoder
    for layer in (1, 2):
        session.start_prefetch(layer, torch.tensor([experts]), torch.tensor([[0.6, 0.4]]))
    decoder.forget()
    after = [layer.prefetches for layer in session.stats.layers]
    return [b - a for a, b in zip(before, after, strict=True)]


def skip_warm_up(session: Session) -> None:
    """Let the next step begin the trial."""
    one_step(session, (5, 6))
    session.engine.budget._state[HOLD] = 1


@pytest.mark.parametrize(
    ("top_k", "amounts"),
    [(1, [1, 0]), (2, [1, 2, 0]), (6, [1, 2, 4, 6, 0]), (8, [1, 2, 4, 8, 0])],
)
def test_amounts_double_up_to_the_experts_of_a_token(top_k: int, amounts: list[int]) -> None:
    assert amounts_to_try(top_k) == amounts


def test_every_layer_of_a_step_is_given_the_amount_of_the_trial() -> None:
    with opened() as session:
        skip_warm_up(session)
        seen = [(one_step(session, (5, 6)), session.engine.budget.records) for _ in range(6)]
    assert [records for _, records in seen] == [1, 1, 2, 2, 0, 0]
    assert all(ahead == [0, records, records] for ahead, records in seen)


def test_trials_begin_again_when_told_to() -> None:
    with opened() as session:
        skip_warm_up(session)
        for _ in range(3):
            one_step(session, (5, 6))
        assert session.engine.budget.records == 2
        session.engine.budget.restart()
        one_step(session, (5, 6))
        assert session.engine.budget.records == 1


def test_a_session_says_when_a_trial_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps of 1 ms each: an amount that a busy machine makes slow would end the trial sooner.
    steps = itertools.count(1)

    def tune(*tensors: Tensor) -> None:
        tune_prefetch(*tensors, now=torch.tensor([next(steps) * 10**6]))

    monkeypatch.setattr(prefetch_budget, "tune_prefetch", tune)
    with opened() as session:
        skip_warm_up(session)
        state = session.engine.budget._state
        for _ in range(5 * BLOCK_STEPS):
            one_step(session, (5, 6))
        assert not session.engine.budget.found
        # The next round is the last.
        state[ROUND] = ROUNDS - 1
        for _ in range(4 * BLOCK_STEPS):
            one_step(session, (5, 6))
        assert session.engine.budget.found and int(state[HOLD]) > 0
        session.engine.budget.restart()
        assert not session.engine.budget.found
    with opened(auto_off=False) as session:
        assert session.engine.budget.found


def test_a_prefill_is_not_measured() -> None:
    with opened() as session:
        one_step(session, (5, 6))
        skip_warm_up(session)
        one_step(session, (5, 6))
        state = session.engine.budget._state
        assert int(state[LAST]) > 0
        many = torch.zeros(400, 2, dtype=torch.int64)
        for layer in (1, 2):
            session.start_prefetch(layer, many, torch.full((400, 2), 0.5))
        assert int(state[LAST]) == 0
        one_step(session, (5, 6))
        assert int(state[LAST]) > 0 and int(state[SHORTEST]) == 0
        one_step(session, (5, 6))
        assert int(state[SHORTEST]) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"auto_off": False},
        {"policy": "default_vector"},
        {"prefetch_budget_bytes": 1 << 30},
        {"transfer": "copy"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_is_tried_where_the_number_is_given_or_must_not_depend_on_times(
    options: dict[str, Any],
) -> None:
    with opened(**options) as session:
        for _ in range(3):
            session.start_prefetch(1, torch.tensor([[5, 6]]), torch.full((1, 2), 0.5))
        assert session.engine.budget.records is None
        assert int(session.engine.budget._state.abs().sum()) == 0


@pytest.mark.parametrize(("slower", "goes_on"), [(3.0, False), (0.5, True)])
def test_where_the_host_copies_prefetching_goes_on_only_if_it_makes_steps_faster(
    slower: float, goes_on: bool
) -> None:
    now_s = [0.0]
    with opened(transfer="copy") as session:
        budget = session.engine.budget
        budget._host_trial = HostTrial(budget._lacked_bytes, lambda: now_s[0])

        def prefetches() -> bool:
            came = one_step(session, (5, 6)) != [0, 0, 0]
            now_s[0] += 0.01 * (slower if came else 1.0)
            return came

        tried = [prefetches() for _ in range(WARM_STEPS + COMPARED_STEPS + 1)]
        assert abs(tried.count(True) - (WARM_STEPS + COMPARED_STEPS // 2)) <= 2
        assert {prefetches() for _ in range(20)} == {goes_on}
        session.configure(SessionOptions(transfer="copy", auto_off=False))
        assert all(prefetches() for _ in range(8))


def test_a_graph_leaves_predictions_out_where_the_host_finds_that_they_do_not_pay() -> None:
    now_s = [0.0]
    layers, edges, ids = [0, 1, 2], [0, 1, 1, 2], torch.tensor([[5, 6]])
    with opened(transfer="copy") as session:
        assert session.engine.plans_steps
        budget = session.engine.budget
        budget._host_trial = HostTrial(budget._lacked_bytes, lambda: now_s[0])

        def speculates(ids: Tensor = ids) -> bool:
            answers = session.plan_step(layers, edges, ids)
            if any(answers):
                assert one_step(session, (5, 6)) != [0, 0, 0], "it begins no step of its own"
            now_s[0] += 0.03 if any(answers) else 0.01
            assert answers in ([True] * 3, [False] * 3)
            return answers[0]

        assert not session.engine.budget.found
        tried = [speculates() for _ in range(WARM_STEPS + COMPARED_STEPS + 1)]
        assert abs(tried.count(True) - (WARM_STEPS + COMPARED_STEPS // 2)) <= 2
        assert not any(speculates() for _ in range(20))
        assert session.engine.budget.found
        session.engine.budget.restart()
        assert not speculates(torch.zeros(400, 2, dtype=torch.int64)), "a prefill predicts nothing"
        session.configure(SessionOptions(transfer="copy", skip_layers=(1,)))
        assert session.plan_step(layers, edges, ids) == [False, True, True]


@pytest.mark.parametrize(
    "options",
    [{}, {"transfer": "copy", "auto_off": False}, {"transfer": "copy", "policy": "commit"}],
)
def test_no_graph_branches_where_the_host_does_not_try(options: dict[str, Any]) -> None:
    with opened(**options) as session:
        assert not session.engine.plans_steps
        # One that was compiled with other options does, and speculates.
        assert session.plan_step([0, 1], [0, 1], torch.tensor([[5, 6]])) == [True, True]


def test_time_beside_steps_is_no_steps() -> None:
    now_s, copied = [0.0], [0]
    trial = HostTrial(lambda: copied[0], lambda: now_s[0])
    seen: list[tuple[float, int]] = []
    trial._trial.end = lambda ms, lacked: seen.append((round(ms, 3), lacked))  # type: ignore[method-assign]
    for pause, taken_s, lacked in ((False, 0.01, 5), (True, 9.0, 5), (False, 0.02, 7)):
        trial.begin_step()
        now_s[0] += taken_s
        copied[0] += lacked
        if pause:
            trial.pause()
    copied[0] = 0  # the counters were reset
    trial.begin_step()
    assert seen == [(10.0, 5)]
    now_s[0] += 0.03
    trial.begin_step()
    assert seen == [(10.0, 5), (30.0, 0)]
