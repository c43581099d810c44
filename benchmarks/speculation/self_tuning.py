"""What the gates of `auto_off` on the CPU are worth, where guesses are right and where they err.

    python -m benchmarks self_tuning --cache 25% --rounds 4
    python -m benchmarks self_tuning --guesses random --name self_tuning_random

Arms run in turns within one process (`benchmarks.kit.paired`): `cache` predicts nothing, `nothing`
reads every guess, `gates` is what the product does. `cache again` and `gates again` say how far an
arm is from itself: the gates are worth keeping where the arm with them differs from the arm
without by two standard errors more than that.

C++ takes the steps of an arm with a cache. With `--guesses random` Python takes them, and every
guess is drawn anew.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
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
from specmoe_compile.hf.attach import session_of
from specmoe_compile.runtime.cpu.engine import CpuEngine
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import quiet_transformers

ARMS: dict[str, dict[str, Any] | None] = {
    "cache": None,
    "nothing": {"prefetch": True, "auto_off": False},
    "gates": {"prefetch": True},
    "cache again": None,
    "gates again": {"prefetch": True},
}
"""Options of the arms; None for an arm without predictions."""
PAIRS = (
    ("cache again", "cache"),
    ("gates again", "gates"),
    ("nothing", "cache"),
    ("gates", "nothing"),
    ("gates", "cache"),
)
"""Which arms are compared: the first over the second."""


def draw_guesses(name: str, warm: Measurement) -> None:
    """Have Python take a warm arm's steps, and draw its guesses."""
    session = session_of(warm.model)
    engine = session.engine
    assert isinstance(engine, CpuEngine), "the arms compute on the CPU"
    if engine.direct_steps is not None:
        engine.direct_steps.turn_off(True)
    if ARMS[name] is not None:
        Predictor(session).begin("random")


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
        jobs = {
            name: place.job(
                cells[f"{'cache' if options is None else 'specmoe'} {given.cache}"],
                work,
                prompts,
                **(options or {}),
            )
            for name, options in ARMS.items()
            if name in given.arms
        }
        prepare = {"prepare": draw_guesses} if given.guesses == "random" else {}
        arms, different = run_paired(jobs, given.rounds, **prepare)
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
