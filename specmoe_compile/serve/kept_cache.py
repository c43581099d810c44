"""The cache of keys and values that outlives a request: a chat's next turn reads its end alone.

One static cache of the server's longest context. It stays where it is, which compiled graphs and
CUDA graphs need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import StaticCache


class KeptCache:
    """Keys and values of the last conversation, and the tokens that they belong to.

    Attributes:
        reused_tokens: tokens that the last `take` did not have to compute again.
    """

    def __init__(self, config: Any, max_context: int) -> None:
        """Make an empty cache.

        Args:
            config: of the model.
            max_context: longest prompt and answer together, in tokens.
        """
        self._cache: Any = StaticCache(config=config, max_cache_len=max_context)
        self._tokens: list[int] = []
        self.reused_tokens = 0

    def take(self, prompt: Sequence[int]) -> Any:
        """Return the cache, holding as long a beginning of the prompt as it can.

        At least one token of the prompt is left to compute: its logits give the first new token.
        """
        common = 0
        for mine, theirs in zip(self._tokens, prompt[:-1], strict=False):
            if mine != theirs:
                break
            common += 1
        if common and not self._rewind(common):
            common = 0
        if not common:
            self._cache.reset()
        self._tokens = list(prompt[:common])
        self.reused_tokens = common
        return self._cache

    def note(self, tokens: Sequence[int]) -> None:
        """Say which tokens were put in: the whole prompt, and all answered tokens but the last.

        The last token's keys and values are computed with the next one, so they are not there yet.
        """
        self._tokens = list(tokens)

    def forget(self) -> None:
        """After an error: what the cache holds is not known."""
        self._tokens = []

    def _rewind(self, length: int) -> bool:
        """Make the cache hold `length` tokens, if all its layers can; whether they did."""
        layers = self._cache.layers
        if not all(
            getattr(layer, "is_initialized", False)
            and type(layer).__name__ == "StaticLayer"
            and hasattr(layer, "cumulative_length")
            for layer in layers
        ):
            # Sliding windows and states of linear attention forget: only a pure extension fits.
            return length == len(self._tokens) and self._holds(length)
        for layer in layers:
            layer.cumulative_length.fill_(length)
        return True

    def _holds(self, length: int) -> bool:
        return int(self._cache.get_seq_length()) == length
