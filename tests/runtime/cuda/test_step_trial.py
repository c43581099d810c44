"""Steps with predictions are kept where they are faster, at whatever number of bytes is lacking."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from specmoe_compile.runtime.cuda.step_trial import (
    BETWEEN_LOOKS,
    BLOCK_STEPS,
    COMPARED_STEPS,
    FIRST_HOLD_STEPS,
    MAX_COMPARED_STEPS,
    WARM_STEPS,
    WORTH,
    StepTrial,
)

RECORD = 3 << 20
TRIAL = WARM_STEPS + COMPARED_STEPS
LONGEST_TRIAL = WARM_STEPS + MAX_COMPARED_STEPS


class Machine:
    """Steps of 10 ms and 1.5 ms per record that they lack, and what predicting changes."""

    def __init__(self, effect: float, *, seed: int = 0, noise: float = 0.0) -> None:
        self.effect, self.noise, self.random = effect, noise, random.Random(seed)
        self.trial = StepTrial()

    def steps(self, count: int) -> Iterator[bool]:
        """Run steps; yields whether each was allowed to predict."""
        for _ in range(count):
            predicts = self.trial.begin()
            records = self.random.choice([2, 5, 9, 14, 20])
            ms = 10.0 + 1.5 * records + self.random.gauss(0.0, self.noise)
            if self.random.random() < 0.03:
                ms *= 5.0  # disturbed by something else
            self.trial.end(ms * (1.0 + predicts * self.effect), records * RECORD)
            yield predicts

    def trial_steps(self) -> list[bool]:
        """Run steps until there is a decision."""
        ways: list[bool] = []
        while self.trial.is_trying:
            ways += self.steps(1)
        return ways


@pytest.mark.parametrize("effect", [-0.05, 0.05])
def test_the_faster_way_is_found_among_steps_that_differ_by_far_more(effect: float) -> None:
    found = []
    for seed in range(40):
        machine = Machine(effect, seed=seed, noise=1.0)
        ways = machine.trial_steps()
        assert TRIAL <= len(ways) <= LONGEST_TRIAL
        assert sum(ways[WARM_STEPS:TRIAL]) == COMPARED_STEPS // 2
        found.append(machine.trial.predicts)
        assert set(machine.steps(50)) == {machine.trial.predicts}
    assert found.count(effect < 0) >= 38


def test_a_trial_takes_as_long_as_it_has_to() -> None:
    """Little noise is told apart at the first look, much of it later, and no difference never."""
    lengths = {
        (effect, noise): [
            len(Machine(effect, seed=seed, noise=noise).trial_steps()) for seed in range(20)
        ]
        for effect, noise in ((-0.3, 0.1), (-0.08, 4.0), (-0.01, 4.0))
    }
    assert set(lengths[-0.3, 0.1]) == {TRIAL}
    assert len(set(lengths[-0.08, 4.0])) > 2
    looks = range(COMPARED_STEPS, MAX_COMPARED_STEPS + 1, BETWEEN_LOOKS)
    assert set(lengths[-0.08, 4.0]) <= {WARM_STEPS + look for look in looks}
    assert lengths[-0.01, 4.0].count(LONGEST_TRIAL) > 10


def test_a_trial_goes_there_and_back_so_that_a_drift_hits_both_ways() -> None:
    ways = list(Machine(0.1).steps(TRIAL))
    assert all(ways[:WARM_STEPS]), "at first slots fill"
    del ways[:WARM_STEPS]
    blocks = [ways[i : i + BLOCK_STEPS] for i in range(0, 8 * BLOCK_STEPS, BLOCK_STEPS)]
    assert [all(block) for block in blocks] == [False, True, True, False] * 2
    assert [any(block) for block in blocks] == [False, True, True, False] * 2


@pytest.mark.parametrize(("effect", "leads"), [(-0.05, True), (0.05, False)])
def test_what_looks_better_gets_three_steps_of_four_until_it_is_clear(
    effect: float, leads: bool
) -> None:
    shares, leaning = [], 16
    for seed in range(60):
        ways = Machine(effect, seed=seed, noise=4.0).trial_steps()[TRIAL:]
        shares += [ways[i : i + leaning] for i in range(0, len(ways), leaning)]
    assert len(shares) > 60
    assert {sum(share) for share in shares} == {4, 12}, "a part of 16 steps leans one way"
    assert sum(sum(share) == (12 if leads else 4) for share in shares) > 0.8 * len(shares)


def test_a_decision_holds_longer_each_time_that_it_is_the_same() -> None:
    machine = Machine(0.2)
    machine.trial_steps()
    for times in (1, 2, 4):
        assert not any(machine.steps(times * FIRST_HOLD_STEPS))
        assert sum(machine.steps(COMPARED_STEPS)) == COMPARED_STEPS // 2, "it is tried again"
        machine.trial_steps()
    machine.effect = -0.2
    list(machine.steps(8 * FIRST_HOLD_STEPS + 1))
    machine.trial_steps()
    assert machine.trial.predicts, "what pays now is found"
    assert all(machine.steps(FIRST_HOLD_STEPS))
    assert not all(machine.steps(COMPARED_STEPS))


@pytest.mark.parametrize("effect", [-0.1, -0.015, -0.005, 0.0, 0.1])
def test_a_gain_too_small_to_tell_is_no_gain(effect: float) -> None:
    trial = StepTrial()
    for _ in range(TRIAL):
        trial.end(5.0 * (1.0 + trial.begin() * effect), 0)
    assert not trial.is_trying
    assert trial.predicts == (effect < -WORTH)
