"""How much may be guessed: which layers take part in a step, and a gate for a kind of guess."""

from __future__ import annotations

from collections.abc import Collection, Sequence

TRIAL_STEPS = 16
"""Steps that are measured before something may be turned off."""
OFF_STEPS = 256
"""Steps that it stays off the first time; each time in a row doubles it."""
MAX_OFF_STEPS = 8192
_DECAY = 1.0 / TRIAL_STEPS


def take_part(layers: Sequence[int], edges: Sequence[int], wanted: Collection[int]) -> list[bool]:
    """Which layers take part in a step: those to predict, and those they are predicted from.

    Args:
        layers: MoE layer ordinals.
        edges: pairs in one list: a layer, and one that can be predicted from it.
        wanted: layers to predict.
    """
    pairs = zip(edges[::2], edges[1::2], strict=True)
    busy = {layer for pair in pairs if pair[1] in wanted for layer in pair}
    return [layer in busy for layer in layers]


class PrefetchGate:
    """Turns one kind of guess off while more of its reads are useless than useful.

    A useful record saves at most the time of its read, and a useless one costs at most as much.
    Both are averaged over about TRIAL_STEPS steps. After a while off, it is tried again.
    """

    __slots__ = ("_off_for", "_off_next", "_steps", "_useful", "_useless")

    def __init__(self) -> None:
        """Start open."""
        self._steps = 0
        self._useful = 0.0
        self._useless = 0.0
        self._off_for = 0
        self._off_next = OFF_STEPS

    @property
    def is_open(self) -> bool:
        """Whether the next `admits` will."""
        return self._off_for == 0

    def admits(self) -> bool:
        """Return whether it is on in this step; counts the step if not."""
        if self._off_for == 0:
            return True
        self._off_for -= 1
        return False

    def measure(self, useful: int, useless: int) -> None:
        """Take in how many records one step read of either kind."""
        self._steps += 1
        rate = max(_DECAY, 1.0 / self._steps)
        self._useful += rate * (useful - self._useful)
        self._useless += rate * (useless - self._useless)
        if self._steps < TRIAL_STEPS:
            return
        if self._useful >= self._useless:
            self._off_next = OFF_STEPS
            return
        self._off_for = self._off_next
        self._off_next = min(MAX_OFF_STEPS, 2 * self._off_next)
        self._steps = 0
        self._useful = self._useless = 0.0
