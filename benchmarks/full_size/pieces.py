"""Which arms the full-size benchmark measures, in what order, and which share a graph.

Shape letters: E experts, K top-k.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from benchmarks.full_size.arms import ARMS, MODES, ROUTINGS, Mode, Routing, sharing_groups


@dataclass(frozen=True, slots=True)
class Piece:
    """Arms at one context, in one mode, under one or both routings."""

    context: int
    mode: Mode
    routings: tuple[Routing, ...]
    arms: tuple[str, ...]

    def __str__(self) -> str:
        routings = " and ".join(self.routings)
        return f"{self.context} tokens, {' '.join(self.arms)}, {self.mode}, {routings}"

    @classmethod
    def parse(cls, text: str) -> Piece:
        """From `4096:graph:trace,router:cache_10,specmoe_10`.

        Raises:
            argparse.ArgumentTypeError: it is not of that form, or names what does not exist.
        """
        parts = text.split(":")
        if len(parts) != 4 or not parts[0].isdecimal():
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected CONTEXT:MODE:ROUTINGS:ARMS,"
                " such as 4096:graph:trace,router:cache_10"
            )
        mode, routings, arms = parts[1], parts[2].split(","), parts[3].split(",")
        for kind, names, known in (
            ("mode", [mode], MODES),
            ("routing", routings, ROUTINGS),
            ("arm", arms, ARMS),
        ):
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(
                        f"{text!r} names the {kind} {name!r}, expected one of {', '.join(known)}"
                    )
        return cls(
            int(parts[0]), cast(Mode, mode), cast("tuple[Routing, ...]", tuple(routings)), (*arms,)
        )

    def without(self, measured: Callable[[int, Routing, str, Mode], bool]) -> Piece:
        """Without the arms that have a row under the first of the routings."""
        arms = [
            arm for arm in self.arms if not measured(self.context, self.routings[0], arm, self.mode)
        ]
        return replace(self, arms=tuple(arms))


def pieces_of(
    contexts: Sequence[int], modes: Sequence[Any], routings: Sequence[Any], arms: Sequence[str]
) -> list[Piece]:
    """One piece for each context and mode."""
    return [
        Piece(context, mode, tuple(routings), tuple(arms)) for context in contexts for mode in modes
    ]


def grouped(piece: Piece, *, experts: int, top_k: int) -> list[Piece]:
    """A piece for each graph that its arms need, see `sharing_groups`."""
    groups = sharing_groups(piece.arms, piece.mode, experts=experts, top_k=top_k)
    return [replace(piece, arms=tuple(group)) for group in groups]
