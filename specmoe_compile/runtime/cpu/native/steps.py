"""Layer steps of decode that run in C++ alone, and what Python shares with them.

Tables, slots and control words are one memory for both; whoever takes a step holds the lock. What
C++ leaves alone (see `src/steps.h`) comes to Python by way of the ops `specmoe::*_python`.

Shape letters: E experts, L MoE layers, S slots per layer.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import CDLL, POINTER
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specmoe_compile.options import SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.memory import StagingRing
from specmoe_compile.runtime.cpu.native.layer import NativeEngine, NativeLayer
from specmoe_compile.runtime.cpu.native.structures import (
    CacheTables,
    ExpertSpec,
    SpareRoom,
    StepControl,
    StepLayer,
)
from specmoe_compile.runtime.policy.misses import MissPolicy

_open: weakref.WeakSet[NativeSteps] = weakref.WeakSet()
_held: list[NativeSteps] = []
"""Those that stand still while this process forks."""


def _before_fork() -> None:
    for steps in list(_open):
        steps.lock.__enter__()
        _held.append(steps)


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().lock.__exit__(None, None, None)


if hasattr(os, "register_at_fork"):
    # In the child the session forgets the lock, see `renew_after_fork`.
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_held.clear
    )

POLICIES = {"lru": 0, "lfu": 1, "adaptive": 2}
NO_FILE = -1
_COUNTERS = (
    "steps",
    "hits",
    "misses",
    "demand_bytes",
    "speculative_bytes",
    "useful_speculative_bytes",
    "wasted_speculative_bytes",
    "pushed_out_bytes",
    "stall_ns",
    "stall_bytes",
    "predicted",
    "needed",
    "recalled",
    "prefetches",
    "late_prefetches",
    "cancelled_prefetches",
    "skipped_experts",
)
"""`Counter` of `src/slots.h`."""
_BUSY, _SKIPPED = 0, 1
_FLAGS = 2


def cache_tables(cache: ExpertCache, layer: int) -> CacheTables:
    """Return where a layer's tables lie. They must not be replaced while that is in use."""
    slot_of, expert_of = cache.slot_of[layer], cache.expert_of[layer]
    scores = cache.scores[layer]
    return CacheTables(
        experts=len(slot_of),
        slots=len(expert_of),
        slot_of=slot_of.buffer_info()[0],
        expert_of=expert_of.buffer_info()[0],
        last_use=cache.last_use[layer].buffer_info()[0],
        clock=cache.clock.buffer_info()[0] + layer * cache.clock.itemsize,
        scores=scores.table.ctypes.data,
        regret=scores.regret.ctypes.data,
        policy=POLICIES[cache.policy],
        spare=cache.spare,
    )


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a layer's records are.

    Attributes:
        native: how they are computed; None where torch computes.
        num_experts: E.
        address: of slot 0, or of expert 0 in place.
        record_bytes: of each.
        file_offset: of expert 0's record in the store's file.
        marks: a byte per expert each, see `Residency.marks`.
        vectors, samples: the default vectors, [E, H] float32, and their samples, [E] int64.
        verified: [E], whether a record's checksum was seen to match; None if it need not be.
        is_slice: the id E stands for experts of other ranks.
    """

    native: NativeLayer | None
    num_experts: int
    address: int
    record_bytes: int
    marks: tuple[bytearray, bytearray]
    vectors: Tensor
    samples: Tensor
    file_offset: int = 0
    verified: bytearray | memoryview | None = None
    is_slice: bool = False


class StepLock:
    """Held by whoever takes a step of a session, in C++ or in Python; may be taken again."""

    def __init__(self, library: CDLL, pointer: int) -> None:
        self._acquire, self._release = library.specmoe_steps_lock, library.specmoe_steps_unlock
        self._pointer = pointer

    def __enter__(self) -> None:
        self._acquire(self._pointer)

    def __exit__(self, *exception: object) -> None:
        self._release(self._pointer)


class NativeSteps:
    """The steps of one session.

    Attributes:
        lock: held by whoever takes a step.
        control: what Python says to C++.
    """

    def __init__(
        self,
        engine: NativeEngine,
        places: Sequence[LayerPlace],
        cache: ExpertCache | None,
        *,
        vectors: DefaultVectors,
        staging: StagingRing | None = None,
        file: int = NO_FILE,
        readers: int = 1,
    ) -> None:
        """Share the tables.

        Args:
            engine: computes.
            places: of each layer.
            cache: its tables are shared; None for experts in place.
            vectors: the places' default vectors.
            staging: what a plan bypasses is read into; None for experts in place.
            file: the store's records, opened for direct reads; `NO_FILE`: Python reads them.
            readers: threads that read.

        Raises:
            MemoryError: none was left.
        """
        count = len(places)
        self.control = StepControl(is_off=1, max_samples=vectors.decode_samples)
        self.control.is_frozen = vectors.frozen_flag.buffer_info()[0]
        self._library = engine.library
        self._counters: NDArray[np.int64] = np.zeros((count, len(_COUNTERS)), np.int64)
        self._flags: NDArray[np.int64] = np.zeros((count, _FLAGS), np.int64)
        layers = (StepLayer * count)()
        for number, (entry, place) in enumerate(zip(layers, places, strict=True)):
            self._describe(entry, place, cache, number)
        # C++ reads all of this for as long as the steps are there.
        self._kept = (engine, cache, vectors, tuple(places), self.control, staging)
        self._pointer = self._library.specmoe_steps_new(
            engine.pointer,
            layers,
            count,
            self.control,
            file,
            readers,
            _spare_room(staging),
        )
        if not self._pointer:
            raise MemoryError("the C++ engine got no memory")
        self.lock = StepLock(self._library, self._pointer)
        self._handle: int | None = None
        _open.add(self)
        self._finalizer = weakref.finalize(self, self._library.specmoe_steps_delete, self._pointer)
        self._finalizer.atexit = False  # see `NativeEngine`

    def _describe(
        self, entry: StepLayer, place: LayerPlace, cache: ExpertCache | None, number: int
    ) -> None:
        if place.native is not None:
            entry.expert = ctypes.cast(ctypes.pointer(place.native.spec), POINTER(ExpertSpec))
        if cache is not None:
            entry.cache = cache_tables(cache, number)
        entry.cache.experts = place.num_experts
        entry.memory = place.address
        entry.record_bytes = place.record_bytes
        entry.is_slice = place.is_slice
        entry.file_offset = place.file_offset
        if place.verified is not None:
            entry.verified = _address(place.verified)
        entry.unused, entry.pushed_out = map(_address, place.marks)
        entry.counters = self._counters[number].ctypes.data
        entry.flags = self._flags[number].ctypes.data
        entry.vectors, entry.samples = place.vectors.data_ptr(), place.samples.data_ptr()

    def enter(self, handle: int) -> None:
        """Take the steps of the session that graphs call by this number, from now on."""
        self._handle = handle
        self._library.specmoe_steps_enter(handle, self._pointer)

    def leave(self) -> None:
        """Take no more steps."""
        if self._handle is not None:
            self._library.specmoe_steps_leave(self._handle, self._pointer)
            self._handle = None

    def turn_off(self, off: bool) -> None:
        """Leave all steps to Python, or take them again."""
        self.control.is_off = off

    def set_busy(self, layer: int, on: bool) -> None:
        """Say whether reads of a layer, or its step, are Python's business now."""
        self._flags[layer, _BUSY] = on

    def use_options(self, options: SessionOptions, misses: MissPolicy, *, in_parts: bool) -> None:
        """Take the options from now on; without `in_parts`, guesses are Python's."""
        control = self.control
        control.guesses = in_parts and not misses.commits
        control.is_judged = options.auto_off
        control.budget_bytes = _or_negative(options.prefetch_budget_bytes)
        control.width = _or_negative(options.prefetch_width)
        control.threshold = -1.0 if misses.threshold is None else misses.threshold
        self._flags[:, _SKIPPED] = [options.skips(layer) for layer in range(len(self._flags))]

    def quiesce(self) -> None:
        """End what is under way, so that Python may take a step."""
        self._library.specmoe_steps_quiesce(self._pointer)

    def renew_after_fork(self) -> None:
        """In a forked process: forget the parent's threads, and a lock that one may hold."""
        self._library.specmoe_steps_renew(self._pointer)

    @property
    def busy_ms(self) -> float:
        """Wall time in which at least one read was in progress."""
        return int(self._library.specmoe_steps_busy_ns(self._pointer)) / 1e6

    def drain(self, stats: Sequence[LayerStats]) -> None:
        """Add what was counted since the last time to the counters of each layer."""
        if not self._counters.any():
            return
        rows: list[list[int]] = self._counters.tolist()
        self._counters[:] = 0
        for own, row in zip(stats, rows, strict=True):
            values = dict(zip(_COUNTERS, row, strict=True))
            own.stall_ms += values.pop("stall_ns") / 1e6
            own.native_steps += values["steps"]
            for name, value in values.items():
                setattr(own, name, getattr(own, name) + value)


def _spare_room(staging: StagingRing | None) -> SpareRoom:
    """Where the ring's places lie; none without a ring."""
    if staging is None:
        return SpareRoom()
    places = staging.places
    names = ("layer_of", "expert_of", "last_use", "is_busy", "clock")
    tables = {name: getattr(places, name).buffer_info()[0] for name in names}
    return SpareRoom(
        places=len(places),
        stride_bytes=staging.stride_bytes,
        memory=staging.address(),
        **tables,
    )


def _address(flags: bytearray | memoryview) -> int:
    return ctypes.addressof((ctypes.c_uint8 * len(flags)).from_buffer(flags))


def _or_negative(value: int | None) -> int:
    return -1 if value is None else value
