"""Arms side by side in one process, in turns of a few seconds.

The speed of a shared machine drifts by tens of percent within minutes, and a process can be a few
percent faster than another one for as long as it lives. Turns of one prompt each, in one process,
leave both out of a comparison. What remains is shown by an arm that is there twice.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch

from specmoe_compile.cli.measure.arm import LoadedArm
from specmoe_compile.cli.measure.arms import ARMS
from specmoe_compile.cli.measure.records import ArmJob, quantile, spread

SKIPPED_TOKENS = 2
"""First tokens of a turn that are not timed: another arm had the processor's cache before them."""


@dataclass
class PairedArm:
    """What an arm did, by rounds over all prompts.

    Attributes:
        rounds: per round, per prompt, milliseconds of each token timed.
        totals: counters of the session per round, prefill left out, with `read_busy_ms`.
    """

    rounds: list[list[list[float]]] = field(default_factory=list)
    totals: list[dict[str, Any]] = field(default_factory=list)

    @property
    def turns_ms(self) -> list[float]:
        """Median of each turn."""
        return [quantile(turn, 0.5) for turns in self.rounds for turn in turns]

    @property
    def samples_ms(self) -> list[list[float]]:
        """Per round, its tokens."""
        return [[ms for turn in turns for ms in turn] for turns in self.rounds]

    def record(self) -> dict[str, Any]:
        """As plain numbers, for a result file."""
        return {
            "tpot_ms": spread([ms for samples in self.samples_ms for ms in samples]),
            "turns_ms": [round(ms, 3) for ms in self.turns_ms],
            "totals": self.totals,
        }


@dataclass(frozen=True)
class Ratio:
    """An arm's time over another's: mean over pairs of turns, and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.error:.3f}"


def ratio(ours_ms: list[float], base_ms: list[float]) -> Ratio:
    """Compare the medians of turns that had the same prompt in the same round."""
    ratios = [ours / base for ours, base in zip(ours_ms, base_ms, strict=True)]
    return Ratio(fmean(ratios), stdev(ratios) / len(ratios) ** 0.5)


class _Clock:
    """A streamer that notes when each token came, and the counters when decoding began."""

    def __init__(self, arm: LoadedArm) -> None:
        self.times_s: list[float] = []
        self.tokens: list[int] = []
        self.before: dict[str, Any] = {}
        self._arm = arm

    def put(self, value: torch.Tensor) -> None:
        if len(self.times_s) == 1:  # after the prompt, the first token: prefill is over
            self.before = _counters(self._arm)
        self.times_s.append(time.perf_counter())
        self.tokens.extend(value.flatten().tolist())

    def steps_ms(self) -> list[float]:
        """Milliseconds of each decode step."""
        times_s = self.times_s[1:]
        return [(end - begin) * 1e3 for begin, end in itertools.pairwise(times_s)]

    def end(self) -> None:
        pass


def run_paired(jobs: Mapping[str, ArmJob], rounds: int) -> tuple[dict[str, PairedArm], int]:
    """Run arms in turns, each a prompt, back and forth.

    Args:
        jobs: by name, what each arm runs; prompts and numbers of tokens are the same.
        rounds: over all prompts.

    Returns:
        The arms by name; and how many of them gave other tokens than the first one.
    """
    loaded = {name: ARMS[job.arm].load(job, ARMS[job.arm]) for name, job in jobs.items()}
    arms = {name: PairedArm() for name in jobs}
    tokens: dict[str, list[list[int]]] = {name: [] for name in jobs}
    prompts = next(iter(jobs.values())).prompts
    for name, job in jobs.items():  # what compiles, compiles here
        _turn(loaded[name], job, prompts[0])
    for number in range(rounds):
        for arm in arms.values():
            arm.rounds.append([])
            arm.totals.append({})
        for place, prompt in enumerate(prompts):
            forth = (number + place) % 2 == 0
            for name in jobs if forth else reversed(jobs):
                clock = _turn(loaded[name], jobs[name], prompt)
                tokens[name].append(clock.tokens)
                arms[name].rounds[-1].append(clock.steps_ms()[SKIPPED_TOKENS:])
                total = arms[name].totals[-1]
                for key, value in _counters(loaded[name]).items():
                    total[key] = total.get(key, 0) + value - clock.before[key]
        for name, arm in arms.items():
            print(
                f"{number + 1}/{rounds} {name}: {quantile(arm.samples_ms[-1], 0.5):.2f} ms",
                flush=True,
            )
    first = json.dumps(next(iter(tokens.values())))
    return arms, sum(json.dumps(found) != first for found in tokens.values())


def _turn(arm: LoadedArm, job: ArmJob, prompt: list[int]) -> _Clock:
    clock = _Clock(arm)
    arm.model.generate(
        torch.tensor([prompt]),
        max_new_tokens=job.new_tokens,
        min_new_tokens=job.new_tokens,
        do_sample=False,
        streamer=clock,
    )
    return clock


def _counters(arm: LoadedArm) -> dict[str, Any]:
    assert arm.read_stats is not None, "arms of specmoe count"
    stats = arm.read_stats()
    numbers: dict[str, Any] = stats.total.as_dict()
    del numbers["hit_rate"], numbers["recall"]
    return {**numbers, "read_busy_ms": stats.read_busy_ms}
