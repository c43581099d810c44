"""A link of a given rate in front of a store: what a rank reads takes the time that it would."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from specmoe_compile import api as opening
from specmoe_compile.runtime.store.base import ExpertStore


class LimitedStore(ExpertStore):
    """A store behind a link of its own: records pass one after the other, at most so fast."""

    def __init__(self, whole: ExpertStore, bytes_per_s: float) -> None:
        """Limit the reads of `whole`, which is closed with this store."""
        super().__init__(whole.layers, fingerprint=whole.fingerprint, top_k=whole.top_k)
        self.kind = whole.kind
        self._whole = whole
        self._bytes_per_s = bytes_per_s
        self._mutex = threading.Lock()
        self._free_s = 0.0

    def read_into(self, layer: int, expert: int, record: torch.Tensor | memoryview) -> None:
        with self._mutex:
            begins_s = max(self._free_s, time.perf_counter())
            self._free_s = ends_s = begins_s + self.layouts[layer].record_bytes / self._bytes_per_s
        self._whole.read_into(layer, expert, record)
        time.sleep(max(0.0, ends_s - time.perf_counter()))

    def close(self) -> None:
        self._whole.close()


@contextmanager
def limited_links(bytes_per_s: float) -> Iterator[None]:
    """Put such a link in front of every store on disk that is opened meanwhile."""
    api: Any = opening  # where a load looks the opening up
    open_packed = api.open_packed

    def limited(*args: Any, **kwargs: Any) -> ExpertStore:
        return LimitedStore(open_packed(*args, **kwargs), bytes_per_s)

    with mock.patch.object(api, "open_packed", limited):
        yield
