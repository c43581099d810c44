"""A model of CUDA streams for CPU tensors: late execution, poisoned destinations, and a record.

Work on a side stream runs only when compute waits for an event recorded after it; until then the
bytes that it will write are NaNs. Every op is recorded with the bytes that it read and wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import specmoe_compile.runtime.cuda.engine  # noqa: F401  (defines the ops below)

_GATHER = torch.ops.specmoe_kernels.gather_experts.default
_COPY = torch.ops.aten.copy_.default
_BY_SLOT = {
    torch.ops.specmoe_kernels.run_resident_experts.default: 1,
    torch.ops.specmoe_kernels.correct_experts.default: 2,
}
"""Ops that read some slots of a bank only -> place of the slots among their arguments."""

_GARBAGE = 0
"""What the host reads where it does not wait: an expert, but not the right one."""

Span = tuple[int, int]


@dataclass
class Op:
    """One op that ran: its stream, the vector clock it was issued at, and bytes [begin, end)."""

    name: str
    stream: str
    clock: dict[str, int]
    reads: list[Span] = field(default_factory=list)
    writes: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    stream: str
    clock: dict[str, int]
    queued: int


class StreamModel:
    """`Streams` on the CPU.

    Args:
        drops: tells whether to leave out a wait, by the waiting stream (or "host") and the event's
            stream.
        late: run side streams as late as possible; else at once.
        patience: how often the host has to ask for an event until it is reached.
    """

    capturing = False

    def __init__(
        self,
        *,
        drops: Callable[[str, str], bool] = lambda waiter, source: False,
        late: bool = True,
        patience: int = 3,
    ) -> None:
        self.ops: list[Op] = []
        self.waits: list[tuple[str, str]] = []
        self._drops = drops
        self._late = late
        self._patience = patience
        self._asked: dict[int, tuple[Event, int]] = {}
        # Values on their way to the host: when they were issued, where they go, what they are.
        self._to_host: list[tuple[int, Tensor, Tensor]] = []
        self._known_to_host: dict[str, int] = {}
        self._clocks: dict[str, dict[str, int]] = {s: {} for s in ("compute", "demand", "prefetch")}
        self._queues: dict[str, list[Callable[[], None]]] = {"demand": [], "prefetch": []}
        self._done = {"demand": 0, "prefetch": 0}

    def restart(self, drops: Callable[[str, str], bool] = lambda waiter, source: False) -> None:
        """Forget what was recorded, and leave out these waits from now on."""
        self.finish()
        self.ops.clear()
        self.waits.clear()
        self._drops = drops

    def record(self, stream: str) -> Event:
        queued = self._done.get(stream, 0) + len(self._queues.get(stream, ()))
        return Event(stream, dict(self._clocks[stream]), queued)

    def wait(self, stream: str, event: Event) -> None:
        self.waits.append((stream, event.stream))
        if self._drops(stream, event.stream):
            return
        _merge(self._clocks[stream], event.clock)
        if stream == "compute" and event.stream != "compute":
            self._run_until(event)

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        with _Issue(self, stream):
            yield

    @contextlib.contextmanager
    def at_once(self, stream: str) -> Iterator[None]:
        """Issue work on a side stream that runs without delay, whatever it is."""
        with _Issue(self, stream, at_once=True):
            yield

    def reached(self, event: Event) -> bool:
        _, asked = self._asked.get(id(event), (event, 0))
        self._asked[id(event)] = (event, asked + 1)  # kept, so that no other gets its id
        if self._late and asked + 1 < self._patience:
            return False
        self.synchronize(event)
        return True

    def synchronize(self, event: Event) -> None:
        self.waits.append(("host", event.stream))
        if self._drops("host", event.stream):
            return
        if event.stream != "compute":
            self._run_until(event)
        _merge(self._known_to_host, event.clock)
        tick = self._known_to_host.get("compute", 0)
        with _disable_current_modes():
            for issued, out, value in self._to_host:
                if issued <= tick:
                    out.copy_(value)
        self._to_host = [entry for entry in self._to_host if entry[0] > tick]

    def to_host(self, tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            value, out = tensor.clone(), torch.full_like(tensor, _GARBAGE)
        tick = self.tick("compute")
        self.ops.append(Op("to_host", "compute", tick, reads=[_span(tensor)]))
        self._to_host.append((tick["compute"], out, value))
        return out

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        with self.on("compute"):
            return tensor.to(device, copy=True)

    def tick(self, stream: str) -> dict[str, int]:
        clock = self._clocks[stream]
        _merge(clock, self._known_to_host)
        clock[stream] = clock.get(stream, 0) + 1
        return dict(clock)

    def defer(self, stream: str, work: Callable[[], None]) -> None:
        if self._late:
            self._queues[stream].append(work)
        else:
            work()
            self._done[stream] += 1

    def finish(self) -> None:
        """Run what no one waited for, as a device would in the end."""
        for stream, queue in self._queues.items():
            while queue:
                queue.pop(0)()
                self._done[stream] += 1

    def _run_until(self, event: Event) -> None:
        queue = self._queues[event.stream]
        while self._done[event.stream] < event.queued:
            queue.pop(0)()
            self._done[event.stream] += 1


def _merge(clock: dict[str, int], other: dict[str, int]) -> None:
    for name, tick in other.items():
        clock[name] = max(tick, clock.get(name, 0))


class _Issue(TorchDispatchMode):
    """Records ops; on a side stream, puts transfers off and poisons what they will write."""

    supports_higher_order_operators = True

    def __init__(self, model: StreamModel, stream: str, *, at_once: bool = False) -> None:
        super().__init__()
        self._at_once = at_once
        self._model = model
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.higher_order.cond:
            chosen, speculate, demand, operands = args  # the host knows it
            branch = speculate if chosen.item() else demand
            with self:
                return branch(*operands)
        if func.namespace == "specmoe" or (
            func.namespace == "aten" and getattr(func, "is_view", False)
        ):
            # What a session does inside its ops is recorded op by op.
            return func(*args, **kwargs)
        op = Op(str(func), self._stream, self._model.tick(self._stream))
        if self._stream == "compute" or self._at_once:
            return _execute(self._model, op, func, args, kwargs)
        assert func in (_GATHER, _COPY), f"{func} is no transfer"
        if self._model._late:
            _poison(func, args)
        self._model.defer(self._stream, lambda: _execute(self._model, op, func, args, kwargs))
        return args[0] if func is _COPY else None


def _execute(model: StreamModel, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
    with _disable_current_modes():  # ops of a graph around this one are no part of it
        op.reads, op.writes = _footprint(func, args)
        out = func(*args, **kwargs)
    op.writes += [_span(t) for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel()]
    model.ops.append(op)
    return out


def _footprint(func: Any, args: Any) -> tuple[list[Span], list[Span]]:
    """Bytes that an op reads and writes, of slots those that it names only."""
    if func is _GATHER:
        sources, banks, experts, slots, count = args
        pairs = list(zip(experts.tolist(), slots.tolist(), strict=True))[: int(count)]
        reads = [_span(t) for t in (experts, slots, count)]
        reads += [_span(source[e]) for source in sources for e, _ in pairs]
        return reads, [_span(bank[slot]) for bank in banks for _, slot in pairs]
    reads, writes = [], []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            if func in _BY_SLOT and argument.name in ("up", "up_bias", "down", "down_bias"):
                chosen = args[_BY_SLOT[func]]
                used = sorted({s for s in chosen.reshape(-1).tolist() if s >= 0})
                reads += [_span(tensor[slot]) for slot in used]
            else:
                (writes if written else reads).append(_span(tensor))
                if written and func is not _COPY:
                    reads.append(_span(tensor))
    return reads, writes


def _span(tensor: Tensor) -> Span:
    """First and last byte of a tensor; of a strided bank, all between."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _poison(func: Any, args: Any) -> None:
    """Fill what a transfer will write with bytes that are NaN in every float type."""
    with _disable_current_modes():
        _fill_with_nan(func, args)


def _fill_with_nan(func: Any, args: Any) -> None:
    if func is _COPY:
        args[0].fill_(0xFF)
        return
    _, banks, _, slots, count = args
    for bank in banks:
        for slot in slots[: int(count)].tolist():
            bank[slot].fill_(0xFF)
