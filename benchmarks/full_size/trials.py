"""How often the trial of `tune_prefetch` finds the best number of records: simulated, not measured.

    python -m benchmarks gpu_full_size_trials full.json --trace full.trace.safetensors
    python -m benchmarks gpu_full_size_trials full.json --trace ... --rounds 24 --margins 80 2

The recorded trace is decoded on a simulated machine (`benchmarks.full_size.bound`), and the
rule of `tune_prefetch` sees the time of each token, with half a per cent of noise. Each trial
begins at another token. What is best says a long run with each number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from benchmarks.full_size.arms import ARMS
from benchmarks.full_size.bound import (
    SHARES,
    Decoding,
    contexts_of,
    gathering_machine,
    read_models,
    result_parser,
)
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.kernels.tune_prefetch import reference
from specmoe_compile.runtime.cuda.prefetch_budget import amounts_to_try

NOISE = 0.005
SETTLES, LONG_RUN = 60, 244
"""Steps that fill the cache, and steps whose mean says how fast a number is."""
Begin = Callable[[], Decoding]


class Found(NamedTuple):
    """What a trial ended with, and after how many steps."""

    amount: int
    steps: int


def mean_ms(decoding: Decoding, amount: int) -> float:
    """Of a long run with one number."""
    for _ in range(SETTLES):
        decoding.step(amount)
    return fmean(decoding.step(amount) for _ in range(LONG_RUN))


def trial(decoding: Decoding, amounts: Sequence[int], seed: int) -> Found:
    """Decode until the rule has chosen."""
    noise = random.Random(seed)
    words, now_ns, steps = [0] * reference.STATE_WORDS, 1, 0
    while words[reference.HOLDS] < 2:
        reference.advance(words, len(amounts), now_ns)
        took_ms = decoding.step(amounts[words[reference.ARM]]) * (1 + noise.gauss(0, NOISE))
        now_ns += int(took_ms * 1e6)
        steps += 1
    return Found(amounts[words[reference.ARM]], steps)


def row_of(begin: Begin, amounts: Sequence[int], trials: int, tokens: int) -> tuple[str, ...]:
    """Best number, how often it was found, what the others cost, and the steps of a trial."""
    means = {amount: mean_ms(begin(), amount) for amount in amounts}
    best = min(means, key=lambda amount: means[amount])
    found: list[Found] = []
    for seed in range(trials):
        decoding = begin()
        decoding.token = random.Random(seed).randrange(tokens)
        found.append(trial(decoding, amounts, seed))
    slower = [means[one.amount] / means[best] - 1 for one in found]
    return (
        str(best),
        f"{sum(one.amount == best for one in found)} of {trials}",
        ", ".join(f"{amount}: {means[amount] / means[best] - 1:.1%}" for amount in amounts),
        f"{fmean(slower):.1%}, {max(slower):.1%}",
        f"{fmean(one.steps for one in found):.0f}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each model; returns the status."""
    parser = result_parser("gpu_full_size_trials", __doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=reference.ROUNDS)
    margins = (reference.FIRST_MARGIN, reference.MIN_MARGIN)
    parser.add_argument("--margins", type=int, nargs=2, default=margins, metavar=("FIRST", "LEAST"))
    args = parser.parse_args(arguments)
    reference.ROUNDS = args.rounds
    reference.FIRST_MARGIN, reference.MIN_MARGIN = args.margins
    for model, results, (true, predicted) in read_models(args.result, args.trace):
        experts = int(results.about["experts"])
        amounts = amounts_to_try(len(true[0][0]))
        rows: list[tuple[str, ...]] = []
        for context in contexts_of(results):
            machine = gathering_machine(results, context, len(true))
            for share in SHARES:
                arm = ARMS[f"specmoe_{share}" if share else "prefetch_no_cache"]
                begin = partial(Decoding, true, predicted, machine, experts=experts, arm=arm)
                cells = row_of(begin, amounts, args.trials, len(true[0]))
                rows.append((str(context), f"{share} %" if share else "none", *cells))
        print(f"\n{model}, simulated, not measured; up to {args.rounds} rounds:\n")
        head = ("context", "cache", "best number ahead", "found", "others are slower by")
        print(markdown_table((*head, "mean, worst loss", "steps"), rows))
    return 0
