"""Places besides the slots, for experts that get none: all layers share them.

A record stays in its place until that is taken for another, the one that was used longest ago
first. What comes back soon is so read once. The tables are arrays of int64 in place, which the
engine in C++ shares.

Shape letters: P places.
"""

from __future__ import annotations

from array import array

NOBODY = -1


class SparePlaces:
    """Whose record each place holds.

    Attributes:
        layer_of, expert_of: of the record in each place, [P]; -1 for none.
        last_use: when each place was last taken or used, [P]; 0 is never.
        is_busy: whether each place is being read into or computed from, [P].
        clock: uses so far, [1].
    """

    def __init__(self, count: int) -> None:
        """Start empty, with so many places."""
        self.layer_of = array("q", [NOBODY] * count)
        self.expert_of = array("q", [NOBODY] * count)
        self.last_use = array("q", [0] * count)
        self.is_busy = array("q", [0] * count)
        self.clock = array("q", [0])

    def __len__(self) -> int:
        return len(self.is_busy)

    def find(self, layer: int, expert: int) -> int:
        """Return the place of a record that may be computed from, or -1."""
        for place, busy in enumerate(self.is_busy):
            if not busy and (self.layer_of[place], self.expert_of[place]) == (layer, expert):
                return place
        return NOBODY

    def use(self, place: int) -> None:
        """Count a use of a place, and keep it until it is released."""
        self.clock[0] += 1
        self.last_use[place] = self.clock[0]
        self.is_busy[place] = 1

    def take(self, layer: int, expert: int) -> int:
        """Give the free place that was used longest ago to a record; -1 if none is free."""
        free = [place for place, busy in enumerate(self.is_busy) if not busy]
        if not free:
            return NOBODY
        place = min(free, key=self.last_use.__getitem__)
        self.layer_of[place], self.expert_of[place] = layer, expert
        self.use(place)
        return place

    def release(self, place: int) -> None:
        """Free a place; its record stays until the place is taken."""
        self.is_busy[place] = 0

    def forget(self, place: int) -> None:
        """Say that a place holds no record."""
        self.layer_of[place] = self.expert_of[place] = NOBODY
