"""Tokens to text, piece by piece: nothing is shown before it is final, stop strings never are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WINDOW_TOKENS = 32
"""From here on the window moves on, which costs a second decoding."""


class TextPieces:
    """Decodes tokens as they come, so that the pieces joined are the text decoded at once.

    A token is decoded beside those before it: a tokenizer may strip the space of a first token, and
    one character may be several tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens that are decoded again
        self._shown = 0  # how many of them are shown
        self._shown_characters = 0  # what these are alone

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next token ids; returns the text that is final now."""
        self._window += tokens
        now = self._decode()
        if len(now) <= self._shown_characters or now.endswith("\ufffd"):
            return ""
        text = now[self._shown_characters :]
        if len(self._window) > _WINDOW_TOKENS and self._shown:
            del self._window[: self._shown]
            now = self._decode()
        self._shown, self._shown_characters = len(self._window), len(now)
        return text

    def rest(self) -> str:
        """The text of an unfinished character at the end."""
        return self._decode()[self._shown_characters :]

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True)
        return text


class StopStrings:
    """Holds back what may become a stop string, and cuts the text where one begins."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Take a piece; returns what can be shown, and whether a stop string was reached."""
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def rest(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
