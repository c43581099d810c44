"""What a result of `python -m benchmarks ranks` says: ratios within its turns, and its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.kit.claims import Claim

MOST = 0.6
"""Two ranks may take this part of one's time, at the same slots per rank."""
SKIPPED = 4
"""Tokens after the first that no time is taken of."""


def turns_ms(result: Mapping[str, Any], ranks: int, slots: int) -> list[float]:
    """Time per token of a case, turn by turn."""
    rows = sorted(result["rows"], key=lambda row: row["turn"])
    return [r["mean_ms"] for r in rows if (r["ranks"], r["slots"]) == (ranks, slots)]


def shares(result: Mapping[str, Any], slots: int, slots_of_one: int) -> list[float]:
    """Turn by turn, the time of N ranks with `slots` each over that of one with `slots_of_one`."""
    pairs = zip(
        turns_ms(result, result["ranks"], slots), turns_ms(result, 1, slots_of_one), strict=True
    )
    return [several / one for several, one in pairs]


def links_alone_or_none(result: Mapping[str, Any]) -> tuple[int, int] | None:
    """Slots on each of N ranks and on one rank that are the same cache in all; None if untimed."""
    pairs = [(s, s * result["ranks"]) for s in result["slots"]]
    return next((pair for pair in pairs if pair[1] in result["slots"]), None)


def told(values: Sequence[float]) -> str:
    """Median of the turns, and their range."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def claims(result: Mapping[str, Any]) -> list[Claim]:
    """What must hold: the median over the turns of the times' ratio within a turn."""
    ranks = result["ranks"]
    found = []
    for slots in result["slots"]:
        ratios = shares(result, slots, slots)
        found.append(
            Claim(
                text=f"{ranks} ranks with {slots} slots each take at most {MOST} x one rank's time",
                measured=told(ratios),
                holds=median(ratios) <= MOST,
            )
        )
    different = len({tuple(row["tokens"]) for row in result["rows"]})
    found.append(
        Claim(
            text="tokens are equal in all cases",
            measured="the same" if different == 1 else f"{different} different answers",
            holds=different == 1,
        )
    )
    return found
