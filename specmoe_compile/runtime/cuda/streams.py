"""The three streams of a device session, behind an interface that tests can model on the CPU.

`compute` is the caller's current stream, `demand` carries records that a step waits for, `prefetch`
those that it may need later. Side streams are forked from compute and joined to it within a step,
so that a CUDA graph can capture the step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

StreamName = Literal["compute", "demand", "prefetch"]

_LOW_PRIORITY = 0
_HIGH_PRIORITY = -1


class Streams(Protocol):
    """Order of work on named streams; only `synchronize` waits on the host."""

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph records what is issued now."""

    def record(self, stream: StreamName) -> Any:
        """Return an event that is reached when all work issued on `stream` so far has ended."""

    def wait(self, stream: StreamName, event: Any) -> None:
        """Hold back what is issued on `stream` from now on until `event` is reached."""

    def on(self, stream: StreamName) -> AbstractContextManager[Any]:
        """Issue work on `stream` within the context."""

    def reached(self, event: Any) -> bool:
        """Whether an event is reached; does not wait."""

    def synchronize(self, event: Any) -> None:
        """Hold the host back until an event is reached."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copy to the host on `compute`; the values are there when a later event is reached."""

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Copy a tensor of the host to the device on `compute`."""


class _Event(NamedTuple):
    event: torch.cuda.Event
    captured: bool


class CudaStreams:
    """Streams of one GPU."""

    def __init__(self, device: torch.device) -> None:
        """Make the side streams; `device` has an index."""
        self._device = device
        self._side = {
            "demand": torch.cuda.Stream(device, priority=_HIGH_PRIORITY),
            "prefetch": torch.cuda.Stream(device, priority=_LOW_PRIORITY),
        }

    @property
    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def record(self, stream: StreamName) -> _Event:
        event = torch.cuda.Event()
        event.record(self._stream(stream))
        return _Event(event, self.capturing)

    def wait(self, stream: StreamName, event: _Event) -> None:
        # Beginning a capture synchronises the device, and an event from the other side of it
        # cannot be waited for.
        if event.captured == self.capturing:
            self._stream(stream).wait_event(event.event)

    def on(self, stream: StreamName) -> AbstractContextManager[Any]:
        if stream == "compute":
            return nullcontext()
        return torch.cuda.stream(self._side[stream])

    def reached(self, event: _Event) -> bool:
        return event.event.query()  # type: ignore[no-any-return]

    def synchronize(self, event: _Event) -> None:
        event.event.synchronize()

    def to_host(self, tensor: Tensor) -> Tensor:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return out.copy_(tensor, non_blocking=True)

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    def _stream(self, stream: StreamName) -> torch.cuda.Stream:
        if stream == "compute":
            return torch.cuda.current_stream(self._device)
        return self._side[stream]
