"""What each part of `auto_off` on the CPU is worth: gates of layers and of ranks, trials of steps.

    python -m benchmarks self_tuning --cache 25% --rounds 4
    python -m benchmarks self_tuning --cache 25% --arms all trial "all again" --name self_tuning_2

Arms run in turns within one process (`benchmarks.kit.paired`): `cache` predicts nothing, `nothing`
reads every guess, `layers` has the gates of layers, `ranks` those and the gates of ranks, `trial`
only the trial of whole steps, `all` is what the product does. `cache again` and `all again` say
how far an arm is from itself: a part is worth keeping where the arm with it differs from the arm
without it by two standard errors more than that.

C++ takes the steps of an arm with a cache, and is told which parts decide. With `--guesses random`
Python takes them, and every guess is drawn anew: what the parts are worth where guesses are wrong.

A trial compares 64 to 320 steps, so an arm should generate a thousand tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.run import held_out_prompts
from benchmarks.kit.command import run_parser
from benchmarks.kit.paired import PairedArm, ratio, run_paired
from benchmarks.kit.places import RESULTS
from benchmarks.speculation.exact import Predictor
from benchmarks.speculation.run import CELLS, DTYPE, Place
from specmoe_compile.bench.harness import run_pack
from specmoe_compile.bench.worker import Measurement
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.engine import CpuEngine
from specmoe_compile.runtime.cpu.native.steps import BY_LAYERS, BY_RANKS, BY_TRIAL
from specmoe_compile.runtime.policy.prefetch_judge import PrefetchJudge, evicted_for_nothing
from specmoe_compile.runtime.session import session_of
from specmoe_compile.runtime.transfer.base import DONE, RUNNING, Issued
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import quiet_transformers

ARMS: dict[str, frozenset[str] | None] = {
    "cache": None,
    "nothing": frozenset(),
    "layers": frozenset({"layers"}),
    "ranks": frozenset({"layers", "ranks"}),
    "trial": frozenset({"trial"}),
    "all": frozenset({"layers", "ranks", "trial"}),
    "cache again": None,
    "all again": frozenset({"layers", "ranks", "trial"}),
}
"""Parts of the judge that decide, by arm; None for an arm without predictions."""
_BITS = {"layers": BY_LAYERS, "ranks": BY_RANKS, "trial": BY_TRIAL}
PAIRS = (
    ("cache again", "cache"),
    ("all again", "all"),
    ("nothing", "cache"),
    ("layers", "nothing"),
    ("ranks", "layers"),
    ("trial", "nothing"),
    ("all", "ranks"),
    ("all", "trial"),
    ("all", "cache"),
)
"""Which arms are compared: the first over the second."""


class PartialJudge(PrefetchJudge):
    """A judge of which some parts admit everything."""

    def __init__(self, engine: CpuEngine, parts: Collection[str]) -> None:
        super().__init__(len(engine.judge.layers), lambda: engine.residency.now_s())
        self._parts = parts

    def begin_step(self, stats: Sequence[LayerStats]) -> bool:
        return super().begin_step(stats) if "trial" in self._parts else True

    def end_step(self, stats: Sequence[LayerStats]) -> None:
        if "trial" in self._parts:
            super().end_step(stats)

    def predicts(self, layer: int) -> bool:
        return super().predicts(layer) if "layers" in self._parts else True

    def admitted(
        self, layer: int, experts: Sequence[int], width: int
    ) -> tuple[list[int], dict[int, int]]:
        if "ranks" in self._parts:
            return super().admitted(layer, experts, width)
        return list(experts), {}

    def measure(
        self, layer: int, issued: Issued, ranks: dict[int, int], wanted: Collection[int]
    ) -> list[int]:
        if "ranks" in self._parts:
            return super().measure(layer, issued, ranks, wanted)
        begun = [e for e, read in issued.reads.items() if read.state in (RUNNING, DONE)]
        if begun and "layers" in self._parts:
            right = sum(expert in wanted for expert in begun)
            self.layers[layer].measure(right, len(begun) - right)
        return evicted_for_nothing(issued, wanted)


def use_parts(name: str, warm: Measurement, guesses: str = "lookahead") -> None:
    """Give a warm arm the judge that it stands for, and the guesses that it judges."""
    session = session_of(warm.model)
    engine, parts = session.engine, ARMS[name]
    assert isinstance(engine, CpuEngine), "the arms compute on the CPU"
    if parts is not None:
        engine.judge = PartialJudge(engine, parts)
    if engine.direct_steps is None:
        return  # without a cache Python takes the steps
    if guesses == "random":  # which Python replaces
        engine.direct_steps.turn_off(True)
        Predictor(session).begin("random")
    elif parts is not None:
        engine.direct_steps.control.is_judged = sum(_BITS[part] for part in parts)


def compared(arms: dict[str, PairedArm]) -> list[dict[str, Any]]:
    """The pairs of which both arms ran."""
    pairs = [(ours, base) for ours, base in PAIRS if ours in arms and base in arms]
    ratios = [(o, b, ratio(arms[o].turns_ms, arms[b].turns_ms)) for o, b in pairs]
    return [{"arm": o, "base": b, "ratio": r.mean, "error": r.error} for o, b, r in ratios]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = run_parser("self_tuning", __doc__)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "demo")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", choices=("25%", "50%"), default="25%")
    parser.add_argument("--guesses", choices=("lookahead", "random"), default="lookahead")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=4, help="over all prompts")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--name", default="self_tuning", help="of the result file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms and write what they did; returns 1 if tokens differ."""
    given = parse_arguments(argv)
    quiet_transformers()
    given.repeats, given.timed_prompts, given.cells = given.rounds, given.prompts, ()
    place, prompts = Place(given), held_out_prompts(given.prompts)
    place.folder.mkdir(parents=True, exist_ok=True)
    cells = {cell.name: cell for cell in CELLS}
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        run_pack(str(place.model()), str(place.store_dir()), DTYPE, cap=None, work_dir=work)
        kinds = {name: "cache" if parts is None else "specmoe" for name, parts in ARMS.items()}
        jobs = {
            name: place.job(cells[f"{kinds[name]} {given.cache}"], work, prompts)
            for name in given.arms
        }
        arms, different = run_paired(
            jobs, given.rounds, prepare=partial(use_parts, guesses=given.guesses)
        )
    pairs = compared(arms)
    settings = {
        name: getattr(given, name) for name in ("rounds", "prompts", "new_tokens", "guesses")
    }
    place.write(
        given.name,
        {
            "cache": given.cache,
            "arms": {name: arm.record() for name, arm in arms.items()},
            "pairs": pairs,
            "different_token_lists": different,
            "settings": settings,
        },
    )
    rows = [(p["arm"], p["base"], f"{p['ratio']:.3f} +- {p['error']:.3f}") for p in pairs]
    print(markdown_table(("arm", "over", "time per token"), rows))
    return 1 if different else 0
