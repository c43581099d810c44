"""What runs share whose arms live in one process and take turns of one prompt each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.kit.command import run_parser
from specmoe_compile.system.machine import cache_folder


class TurnTaker(Protocol):
    """An arm of such a run."""

    def turn(self, prompt: Sequence[int], new_tokens: int, *, counts: bool) -> None:
        """Continue one prompt; `counts` is False while it warms up."""


def take_turns(
    arms: Sequence[TurnTaker],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    warm_up: int,
) -> None:
    """Every arm in turn, forth and back, after so many turns of each on the first prompt."""
    for arm in arms:
        for _ in range(warm_up):
            arm.turn(prompts[0], new_tokens, counts=False)
    for number, prompt in enumerate(prompts[1:]):
        for arm in arms if number % 2 == 0 else reversed(arms):
            arm.turn(prompt, new_tokens, counts=True)


def turns_parser(
    name: str, description: str | None, *, result: Path, new_tokens: int
) -> argparse.ArgumentParser:
    """The command line of a run on the reference model with larger records."""
    parser = run_parser(name, description)
    parser.add_argument("--new-tokens", type=int, default=new_tokens)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "demo")
    parser.add_argument("--result", type=Path, default=result)
    return parser
