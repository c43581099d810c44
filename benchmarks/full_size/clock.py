"""When each token of a generation came."""

from __future__ import annotations

import time

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """When each token came, in seconds; the prompt is not one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._started = False

    def put(self, value: Tensor) -> None:
        if self._started:
            self.times.append(time.perf_counter())
        self._started = True

    def end(self) -> None:
        """Nothing is left."""
