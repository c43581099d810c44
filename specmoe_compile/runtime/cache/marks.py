"""A set of a layer's experts as one byte each, which the engine in C++ shares.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSet


class ExpertMarks(MutableSet[int]):
    """Experts that something is true of.

    Attributes:
        flags: [E], 1 for those in the set; never replaced.
    """

    __slots__ = ("flags",)

    def __init__(self, num_experts: int) -> None:
        """Start empty."""
        self.flags = bytearray(num_experts)

    @classmethod
    def _from_iterable(cls, it: Iterable[int]) -> set[int]:  # type: ignore[override]
        """What set operations make."""
        return set(it)

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, int) and 0 <= expert < len(self.flags) and self.flags[expert] > 0

    def __iter__(self) -> Iterator[int]:
        return (expert for expert, flag in enumerate(self.flags) if flag)

    def __len__(self) -> int:
        return self.flags.count(1)

    def add(self, value: int) -> None:
        self.flags[value] = 1

    def discard(self, value: int) -> None:
        if value in self:
            self.flags[value] = 0

    def update(self, experts: Iterable[int]) -> None:
        """Add several."""
        for expert in experts:
            self.flags[expert] = 1

    def clear(self) -> None:
        self.flags[:] = bytes(len(self.flags))
