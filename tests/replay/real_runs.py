"""Real runs of a tiny model, recorded: what replays are compared with."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import specmoe_compile
from specmoe_compile.hf.attach import session_of
from specmoe_compile.replay.recorder import TraceRecorder
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.transfer.base import DONE, Read, Ticket, Transfer
from specmoe_compile.runtime.transfer.read_queue import ReadQueue
from tests.helpers import greedy, prompts, prompts_left_to_the_model, tiny_qwen3_moe


@dataclass(frozen=True, slots=True, kw_only=True)
class RealRun:
    """A trace, and what the session counted meanwhile."""

    trace: RoutingTrace
    stats: Stats


def real_run(
    store_dir: Path,
    *,
    expert_cache: str | int,
    policy: str = "lru",
    batch: int = 1,
    prompt: int = 20,
    new_tokens: int = 24,
    generations: int = 2,
    options: dict[str, Any] | None = None,
    reads_at_once: bool = False,
    read_s: float = 0.0,
    layers: int = 3,
) -> RealRun:
    """Generate with a tiny model whose experts are on disk, and record it.

    Args:
        options: of `torch.compile`, over `prefetch=True`; None runs eagerly, without predictions.
        reads_at_once: serve each read in the call that starts it, so that no decision depends on
            time.
        read_s: let each read take so long, one after the other, whatever the disk does.
    """
    model: Any = specmoe_compile.offload(
        tiny_qwen3_moe(layers=layers, experts=16, top_k=3),
        device="cpu",
        store="disk",
        expert_cache=expert_cache,
        cache_policy=policy,  # type: ignore[arg-type]
        store_dir=store_dir,
        progress=False,
    )
    session = session_of(model)
    if reads_at_once:
        use_reads_at_once(session)
    if read_s:
        slow_down_reads(session, read_s)
    recorder = TraceRecorder(session)
    runner, cache = model, {}
    if options is not None:
        cache = {"cache_implementation": "static"}  # one graph, not two
        options = {"lowering": "eager", "prefetch": True, **options}
        runner = torch.compile(model, backend="specmoe", options=options)
    with prompts_left_to_the_model():
        for number in range(generations):
            greedy(runner, prompts(batch, prompt, seed=number), new_tokens, **cache)
    run = RealRun(trace=recorder.trace("tiny"), stats=session.stats)
    specmoe_compile.close(model)
    return run


def slow_down_reads(session: Session, read_s: float) -> None:
    """Let a disk that serves one read at a time take so long for each."""
    store: Any = session.store
    read_into, disk = store.read_into, threading.Lock()

    def slowly(*place: Any) -> None:
        with disk:
            time.sleep(read_s)
            read_into(*place)

    store.read_into = slowly


def use_reads_at_once(session: Session) -> None:
    """Replace a session's reader threads by reads in the caller."""
    residency: Any = session.engine.residency
    assert residency.transfer is session.engine.transfer
    residency.transfer = ReadsAtOnce(session.store)


class _Ticket(Ticket):
    def __init__(self, reads: dict[int, Read]) -> None:
        self.reads = reads

    def wait(self, expert: int | None = None) -> None:
        pass


class ReadsAtOnce(Transfer):
    """Reads each record of the real store before `start` returns."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._queue = ReadQueue(readers=1, largest_record_bytes=1)

    @property
    def busy_ms(self) -> float:
        return self._queue.busy_ms(self.now_s())

    def start(
        self,
        layer: int,
        requests: Sequence[tuple[int, torch.Tensor]],
        *,
        speculative: bool = False,
    ) -> Ticket:
        reads = {e: Read(layer, e, place, speculative=speculative) for e, place in requests}
        self._queue.add(reads.values(), speculative=speculative)
        while (read := self._queue.begin_or_none(self.now_s())) is not None:
            self._store.read_into(layer, read.expert, read.destination)
            self._queue.finish(read, self.now_s())
        return _Ticket(reads)

    def cancel(self, ticket: Ticket, experts: Collection[int] | None = None) -> list[int]:
        return []

    def promote(self, read: Read) -> bool:
        return self._queue.promote(read)

    def wait_any(self, reads: Iterable[Read]) -> Read:
        return next(read for read in reads if read.state >= DONE)

    def close(self) -> None:
        pass
