"""Whole streams of steps through the cache policy, in C++ where there is a compiler.

Both ways give the same integers (tests/benchmarks/test_eviction.py); C++ is forty times faster.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import specmoe_compile.runtime.cpu.native as native
from specmoe_compile.runtime.cache.slot_table import ExpertCache, belady_hits
from specmoe_compile.runtime.cpu.native.steps import cache_tables

Stream = Sequence[Sequence[int]]
_SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def library_or_none() -> Any:
    """The library, compiled in two seconds and loaded; None without a compiler."""
    policy = Path(native.__file__).parent / "src"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "fast_replay.so"
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-I", str(policy)]
        command += [str(_SOURCE), str(policy / "cache.cpp"), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(made))
    library.replay_belady.restype = ctypes.c_int64
    return library


def hits(stream: Stream, experts: int, slots: int, *, policy: Any, spare: int = 0) -> list[int]:
    """Hits of each step of one layer, from an empty cache.

    Args:
        stream: distinct experts of each step, in time order.
        experts, slots: E and S.
        policy, spare: of `ExpertCache`.
    """
    return hits_from(
        ExpertCache(num_experts=[experts], slots=[slots], policy=policy, spare=spare), stream
    )


def hits_from(table: ExpertCache, stream: Stream) -> list[int]:
    """Hits of each step of a table's only layer, from what it holds now."""
    library = library_or_none()
    if library is None:
        return [len(table.plan(0, wanted).hits) for wanted in stream]
    asked, ends = _flat(stream)
    found: NDArray[np.int64] = np.zeros(len(stream), np.int64)
    library.replay_policy(
        ctypes.byref(cache_tables(table, 0)),
        *map(_pointer, (asked, ends)),
        ctypes.c_int64(len(stream)),
        _pointer(found),
    )
    counts: list[int] = found.tolist()
    return counts


def best_hits(stream: Stream, experts: int, slots: int, *, may_bypass: bool) -> int:
    """`belady_hits` of one layer."""
    library = library_or_none()
    if library is None:
        return belady_hits(stream, slots, may_bypass=may_bypass)
    asked, ends = _flat(stream)
    return int(
        library.replay_belady(
            *map(ctypes.c_int64, (experts, slots)),
            ctypes.c_int32(may_bypass),
            *map(_pointer, (asked, ends)),
            ctypes.c_int64(len(stream)),
        )
    )


def _flat(stream: Stream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All steps' experts one after the other, and where each step's end."""
    ends = np.cumsum([len(wanted) for wanted in stream], dtype=np.int64)
    return np.fromiter(itertools.chain.from_iterable(stream), np.int64), ends


def _pointer(array: NDArray[np.int64]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
