"""A job's events on their way from the engine's thread to the event loop, a few at a time.

Both threads share one interpreter lock, and on a small machine the cores too: what the loop does
for a token is time that the next token waits. So the engine's thread puts text down and goes on;
the loop fetches it at most every `PAUSE_S`. An end wakes the loop at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable

from specmoe_compile.serve.engine import Event, Piece

PAUSE_S = 0.02
"""Shortest time between two texts of a stream. Slower tokens have a text each."""


class Inbox:
    """Made in the loop; `put` is the engine's, `take` the loop's."""

    def __init__(self, *, pause_s: float | None) -> None:
        """Begin with nothing.

        Args:
            pause_s: shortest time between two texts; None: nobody wants text before the end.
        """
        self._loop = asyncio.get_running_loop()
        self._pause_s = pause_s
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._wakes_for_text = False
        self._next_s = self._loop.time()

    def put(self, event: Event) -> None:
        """Add an event; from any thread."""
        self._events.append(event)
        if self._wakes_for_text or not isinstance(event, Piece):
            self._wakes_for_text = False
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
                self._loop.call_soon_threadsafe(self._wake.set)

    async def take(self) -> list[Event]:
        """Wait for events, at least one; returns all that came, text of one choice joined."""
        if self._pause_s is not None:
            await self._rest()
        while not self._events:
            self._wakes_for_text = self._pause_s is not None
            if not self._events:  # else it came before `put` could know
                await self._wake.wait()
                self._wake.clear()
        self._wakes_for_text = False
        if self._pause_s is not None:
            self._next_s = self._loop.time() + self._pause_s
        return joined([self._events.popleft() for _ in range(len(self._events))])

    async def _rest(self) -> None:
        """Wait until text is wanted again, or something else came."""
        if self._loop.time() < self._next_s:
            timer = self._loop.call_at(self._next_s, self._wake.set)
            try:
                await self._wake.wait()
                self._wake.clear()
            finally:
                timer.cancel()


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events, with texts of one choice that follow each other as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Piece) and isinstance(last, Piece) and last.choice == event.choice:
            out[-1] = Piece(event.choice, last.text + event.text)
        else:
            out.append(event)
    return out
