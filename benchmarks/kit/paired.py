"""Arms side by side in one process, in turns of a few seconds.

The speed of a shared machine drifts by tens of percent within minutes, and a process can be a few
percent faster than another one for as long as it lives. Turns of one prompt each, in one process,
leave both out of a comparison. What remains is shown by an arm that is there twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.kit.traffic import counted
from specmoe_compile.bench.records import ArmJob, ArmRun, spread
from specmoe_compile.bench.worker import Measurement


class PairedArm:
    """What an arm did: `rounds` of turns, one turn for each prompt."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.rounds: list[list[ArmRun]] = []

    @property
    def turns_ms(self) -> list[float]:
        """Median of each turn."""
        return [median(turn.tpot_samples_ms) for turns in self.rounds for turn in turns]

    @property
    def samples_ms(self) -> list[list[float]]:
        """Per round, its tokens."""
        return [[ms for turn in turns for ms in turn.tpot_samples_ms] for turns in self.rounds]

    @property
    def tokens(self) -> list[list[int]]:
        """What each turn generated."""
        return [tokens for turns in self.rounds for turn in turns for tokens in turn.tokens]

    @property
    def tpot_ms(self) -> dict[str, float]:
        """Quantiles over all tokens."""
        return spread([ms for samples in self.samples_ms for ms in samples])

    @property
    def total(self) -> dict[str, float]:
        """The session's counters over all turns, prefill left out, with `read_busy_ms`."""
        return counted([turn for turns in self.rounds for turn in turns])

    @property
    def notes(self) -> list[str]:
        """What spoils the times: graphs that were compiled during a turn."""
        runs = (turn for turns in self.rounds for turn in turns)
        return sorted({note for run in runs for note in run.notes if "graphs were" in note})

    def record(self) -> dict[str, Any]:
        """As plain numbers, for a result file."""
        return {
            "tpot_ms": self.tpot_ms,
            "turns_ms": [round(ms, 3) for ms in self.turns_ms],
            "totals": [self.total],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Ratio:
    """An arm's time over another's: mean over pairs of turns, and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.error:.3f}"


def ratio(ours_ms: Sequence[float], base_ms: Sequence[float]) -> Ratio:
    """Compare the medians of turns that had the same prompt in the same round."""
    ratios = [ours / base for ours, base in zip(ours_ms, base_ms, strict=True)]
    return Ratio(fmean(ratios), stdev(ratios) / len(ratios) ** 0.5)


def run_paired(
    jobs: Mapping[str, ArmJob],
    rounds: int,
    *,
    prepare: Callable[[str, Measurement], None] = lambda name, warm: None,
) -> tuple[dict[str, PairedArm], int]:
    """Run arms in turns, each a prompt, back and forth.

    Args:
        jobs: by name, what each arm runs; prompts and numbers of tokens are the same.
        rounds: over all prompts.
        prepare: called with each arm when it is warm, before the first turn.

    Returns:
        The arms by name; and how many of them gave other tokens than the first one.
    """
    warm = {name: Measurement(job, emit=lambda *_, **__: None) for name, job in jobs.items()}
    for name, measurement in warm.items():
        prepare(name, measurement)
    arms = {name: PairedArm() for name in jobs}
    for number in range(rounds):
        for arm in arms.values():
            arm.rounds.append([])
        for place, prompt in enumerate(next(iter(jobs.values())).prompts):
            forth = (number + place) % 2 == 0
            for name in jobs if forth else reversed(list(jobs)):
                arms[name].rounds[-1].append(warm[name].turn(warm_up=False, prompts=[prompt]))
        for name, arm in arms.items():
            print(
                f"{number + 1}/{rounds} {name}: {median(arm.samples_ms[-1]):.2f} ms",
                flush=True,
            )
    first = next(iter(arms.values())).tokens
    return arms, sum(arm.tokens != first for arm in arms.values())
