"""What prompts chose, on its way to tables that the host keeps.

Shape letters: T tokens, K top-k.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from torch import Tensor

from specmoe_compile.runtime.cache.eviction import PROMPT_TOKENS
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cuda.streams import Streams


class PromptsOnTheirWay:
    """Last tokens of prompts, in order; the host never waits for them."""

    def __init__(self, streams: Streams) -> None:
        """Start without any."""
        self._streams = streams
        self._sent: defaultdict[int, deque[tuple[Tensor, Any]]] = defaultdict(deque)

    def send(self, layer: int, ids: Tensor) -> None:
        """Start copying what the last tokens of ids, [T, K], chose."""
        on_host = self._streams.to_host(ids[-PROMPT_TOKENS:])
        self._sent[layer].append((on_host, self._streams.record("compute")))

    def note(self, table: ExpertCache, layer: int, *, waited: bool = False) -> None:
        """Count those that have arrived.

        Args:
            table: of the layers.
            layer: MoE layer ordinal.
            waited: the host waited for a later event: all have.
        """
        sent = self._sent[layer]
        while sent and (waited or self._streams.reached(sent[0][1])):
            table.note_prompt(layer, sent.popleft()[0].numpy())

    def forget(self) -> None:
        """Drop those that were not counted."""
        self._sent.clear()
