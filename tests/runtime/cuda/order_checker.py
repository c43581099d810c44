"""Finds pairs of ops on the same bytes, one of them writing, that no event orders."""

from __future__ import annotations

from collections.abc import Sequence

from tests.runtime.cuda.stream_model import Op, Span


def unordered_pairs(ops: Sequence[Op]) -> list[tuple[Op, Op]]:
    """Return the conflicting pairs of different streams without a happens-before path.

    An op happens before another if the other's vector clock knows its tick (C. J. Fidge,
    "Timestamps in message-passing systems that preserve the partial ordering", 1988).
    """
    side = [op for op in ops if op.stream != "compute"]
    pairs: list[tuple[Op, Op]] = []
    for index, one in enumerate(side):
        compute = [op for op in ops if op.stream == "compute"]
        for other in (*compute, *side[index + 1 :]):
            if one.stream == other.stream or _knows(one, other) or _knows(other, one):
                continue
            if (
                _overlap(one.writes, other.writes)
                or _overlap(one.writes, other.reads)
                or _overlap(one.reads, other.writes)
            ):
                pairs.append((one, other))
    return pairs


def _knows(later: Op, earlier: Op) -> bool:
    return later.clock.get(earlier.stream, 0) >= earlier.clock[earlier.stream]


def _overlap(one: Sequence[Span], other: Sequence[Span]) -> bool:
    return any(a < d and c < b for a, b in one for c, d in other)
