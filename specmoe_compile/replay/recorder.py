"""Records a session's routing while it runs.

Shape letters: T tokens, L MoE layers, K top-k, P predicted per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.errors import TraceError
from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.replay.formats import described
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.cache.double_buffers import DoubleBuffers
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cpu.engine import CpuEngine
from specmoe_compile.runtime.session import Session

Rows = tuple[Tensor, Tensor]
"""Ids [T, K] int16 and weights [T, K] float32 of our own."""


@dataclass(slots=True)
class _Step:
    """One forward pass so far; lists are by MoE layer."""

    started_s: float
    before: tuple[float, float, int]
    routed: list[Rows] = field(default_factory=list)
    split: list[bool] = field(default_factory=list)
    predicted: list[Rows | None] = field(default_factory=list)
    ended_s: float = 0.0
    after: tuple[float, float, int] = (0.0, 0.0, 0)


class TraceRecorder:
    """A session's observer that keeps what it is told; `trace` gives it back.

    A step that an error or an interruption cut short is left out.
    """

    def __init__(self, session: Session) -> None:
        """Start to record `session`.

        Raises:
            TraceError: its experts are computed in place or on a GPU, where nothing is fetched, or
                the device decides.
        """
        engine = session.engine
        if not isinstance(engine, CpuEngine) or engine.cache is None:
            raise TraceError(
                "a routing trace is recorded where experts are fetched by the CPU: load the model"
                ' with device="cpu" and store="disk" (--device cpu --store disk)'
            )
        self._session = session
        self._cache = engine.cache
        self._steps: list[_Step] = []
        self._step: _Step | None = None
        self._guesses: dict[int, Rows] = {}
        session.observer = self

    def predicted(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        if ids.shape[0] <= MAX_DECODE_TOKENS:
            self._guesses[layer] = _own(ids, weights)

    def routed(self, layer: int, ids: Tensor, weights: Tensor, *, split: bool) -> None:
        if layer == 0:
            self._begin()
        step = self._step
        if step is None or layer != len(step.routed):
            # An op that ran twice, or the rest of a step whose beginning was lost.
            return
        step.routed.append(_own(ids, weights))
        step.split.append(split)
        step.predicted.append(self._guesses.pop(layer, None))

    def trace(self, model: str) -> RoutingTrace:
        """Stop recording and return the trace.

        Args:
            model: its name, for people.

        Raises:
            TraceError: no step ran from its first layer to its last.
        """
        self._end()
        self._session.observer = None
        store = self._session.store
        steps = [step for step in self._steps if len(step.routed) == len(store.layers)]
        if not steps:
            raise TraceError("no step of the model was recorded: nothing ran")
        return RoutingTrace(
            model=model,
            fingerprint=store.fingerprint,
            num_experts=store.num_experts,
            record_bytes=tuple(layout.record_bytes for layout in store.layouts),
            top_k=max(ids.shape[1] for step in steps for ids, _ in step.routed),
            setting=_setting(self._session, self._cache),
            tensors=_tensors(steps),
        )

    def _begin(self) -> None:
        self._end()
        now_s, counters = time.perf_counter(), self._counters()
        if self._steps:
            self._steps[-1].ended_s, self._steps[-1].after = now_s, counters
        self._step = _Step(now_s, counters)

    def _end(self) -> None:
        if self._step is not None:
            self._steps.append(self._step)
            self._step.after = self._counters()
        self._step = None

    def _counters(self) -> tuple[float, float, int]:
        """Stall, reading time and bytes read so far."""
        stats = self._session.stats
        total = stats.total
        return total.stall_ms, stats.read_busy_ms, total.demand_bytes + total.speculative_bytes


def _own(ids: Tensor, weights: Tensor) -> Rows:
    """Copy: graphs reuse their buffers."""
    return ids.to(torch.int16, copy=True), weights.to(torch.float32, copy=True)


def _setting(session: Session, cache: ExpertCache | DoubleBuffers) -> dict[str, Any]:
    return {
        "slots": [len(slots) for slots in cache.expert_of] if isinstance(cache, ExpertCache) else 0,
        "cache_policy": cache.policy if isinstance(cache, ExpertCache) else None,
        "speculation": session.speculation.as_dict(),
        "experts": described(session.store.layouts),
    }


def _tensors(steps: Sequence[_Step]) -> dict[str, Tensor]:
    short = [step for step in steps if len(step.routed[0][0]) <= MAX_DECODE_TOKENS]
    most = max((p[0].shape[1] for s in short for p in s.predicted if p is not None), default=0)
    spans = [max(0.0, step.ended_s - step.started_s) * 1e3 for step in steps]
    return {
        "tokens": torch.tensor([len(step.routed[0][0]) for step in steps], dtype=torch.int32),
        **_stacked("ids", "weights", [step.routed for step in steps]),
        "split": torch.tensor([step.split for step in steps], dtype=torch.uint8),
        "predicted": torch.tensor(
            [[p is not None for p in step.predicted] for step in steps], dtype=torch.uint8
        ),
        **_stacked(
            "predicted_ids",
            "predicted_weights",
            [[_or_nothing(p, len(s.routed[0][0]), most) for p in s.predicted] for s in short],
            layers=len(steps[0].routed),
            width=most,
        ),
        "step_ms": torch.tensor(spans, dtype=torch.float32),
        "stall_ms": torch.tensor([s.after[0] - s.before[0] for s in steps], dtype=torch.float32),
        "read_ms": torch.tensor([s.after[1] - s.before[1] for s in steps], dtype=torch.float32),
        "read_bytes": torch.tensor([s.after[2] - s.before[2] for s in steps], dtype=torch.int64),
    }


def _or_nothing(rows: Rows | None, tokens: int, width: int) -> Rows:
    if rows is not None:
        return rows
    return torch.full((tokens, width), -1, dtype=torch.int16), torch.zeros(tokens, width)


def _stacked(
    ids_name: str,
    weights_name: str,
    steps: Sequence[Sequence[Rows]],
    *,
    layers: int = 0,
    width: int = 0,
) -> dict[str, Tensor]:
    """Stack steps and layers, [rows, L, width], padded with expert -1 and weight 0."""
    width = max((rows[0].shape[1] for step in steps for rows in step), default=width)
    if not steps:
        return {
            ids_name: torch.empty(0, layers, width, dtype=torch.int16),
            weights_name: torch.empty(0, layers, width),
        }
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in steps:
        for place, filler in ((0, -1), (1, 0)):
            padded = [
                torch.nn.functional.pad(
                    rows[place], (0, width - rows[place].shape[1]), value=filler
                )
                for rows in step
            ]
            parts[place].append(torch.stack(padded, dim=1))
    return {ids_name: torch.cat(parts[0]), weights_name: torch.cat(parts[1])}
