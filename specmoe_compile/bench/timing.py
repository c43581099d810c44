"""Times of tokens, taken where `generate` hands them out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class TokenClock:
    """A streamer for `generate` that notes when each token came.

    What happens inside the clock (printing, callbacks) is left out of the times between tokens.

    Attributes:
        ttft_ms: from `start` to the first token; None before it.
        intervals_ms: times between one token and the next.
    """

    def __init__(self, *, inner: Any = None, on_token: Callable[[int], None] | None = None) -> None:
        """Wrap a text streamer.

        Args:
            inner: streamer that gets everything too, or None.
            on_token: called with the number of tokens so far, after each.
        """
        self._inner = inner
        self._on_token = on_token
        self._tokens = 0
        self._prompt_seen = False
        self._resumed_s = 0.0
        self.ttft_ms: float | None = None
        self.intervals_ms: list[float] = []

    def start(self) -> None:
        """Begin; call it right before `generate`."""
        self._tokens = 0
        self._prompt_seen = False
        self.ttft_ms = None
        self.intervals_ms = []
        self._resumed_s = time.perf_counter()

    def put(self, value: Any) -> None:
        """Take the prompt ([B, W] ids, first call) or one token ([B] ids)."""
        now_s = time.perf_counter()
        if not self._prompt_seen:
            self._prompt_seen = True
            if self._inner is not None:
                self._inner.put(value)
            return
        elapsed_ms = (now_s - self._resumed_s) * 1e3
        if self.ttft_ms is None:
            self.ttft_ms = elapsed_ms
        else:
            self.intervals_ms.append(elapsed_ms)
        self._tokens += 1
        if self._inner is not None:
            self._inner.put(value)
        if self._on_token is not None:
            self._on_token(self._tokens)
        self._resumed_s = time.perf_counter()

    def end(self) -> None:
        """Finish the text streamer's line."""
        if self._inner is not None:
            self._inner.end()
