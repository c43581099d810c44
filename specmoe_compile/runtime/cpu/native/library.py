"""Finding, compiling and opening the C++ library; without one, Python's own path computes.

A wheel carries the library beside this file. A clone compiles it once into the cache folder, under
a name that changes with the sources.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from ctypes import CDLL, POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

from specmoe_compile.runtime.cpu.native import build
from specmoe_compile.runtime.cpu.native.structures import (
    STRUCTURES,
    CacheTables,
    ExpertSpec,
    ExpertTask,
    SpareRoom,
    StepControl,
    StepLayer,
)
from specmoe_compile.system.machine import available_ram_bytes, cache_folder, cpu_count
from specmoe_compile.system.sizes import format_bytes

log = logging.getLogger(__name__)

_BUILD_BYTES = 1 << 30
"""RAM that compiling takes: 735 MiB (g++ 12)."""

_lock = threading.Lock()


def library_or_none() -> CDLL | None:
    """Return the library, compiling it if need be; None, with one warning, if that cannot be."""
    with _lock:
        return _library_or_none()


@functools.cache
def _library_or_none() -> CDLL | None:
    try:
        return _declared(ctypes.CDLL(str(_path())))
    except (build.BuildError, OSError) as error:
        log.warning(
            "The experts are computed by torch and not by the C++ engine, which is faster: %s."
            " Results are exact either way; with g++ and enough memory it is there.",
            error,
        )
        return None


def _path() -> Path:
    carried = Path(__file__).resolve().parent / build.LIBRARY_NAME
    if carried.is_file():
        return carried
    compiled = cache_folder() / "native" / build.source_digest() / build.LIBRARY_NAME
    if not compiled.is_file():
        check_can_build(_BUILD_BYTES)
        log.warning("compiling the C++ engine once (40 seconds of one core): %s", compiled)
        build.build(compiled)
    return compiled


def check_can_build(wanted_bytes: int) -> None:
    """Raise `BuildError` without a compiler, or with too little RAM for it.

    A compiler that takes more than a container may have ends this process and not itself.
    """
    build.find_compiler()
    free_bytes = available_ram_bytes()
    if free_bytes < wanted_bytes:
        raise build.BuildError(
            f"compiling it takes about {format_bytes(wanted_bytes)} of RAM, and"
            f" {format_bytes(free_bytes)} are free"
        )


def _declared(library: CDLL) -> CDLL:
    """Tell ctypes the functions of `src/api.cpp`."""
    library.specmoe_struct_bytes.argtypes = (c_int32,)
    library.specmoe_struct_bytes.restype = c_int64
    sizes = tuple(library.specmoe_struct_bytes(which) for which in range(len(STRUCTURES)))
    if sizes != tuple(ctypes.sizeof(structure) for structure in STRUCTURES):
        raise OSError(f"{library._name} was compiled from other sources: remove it")
    library.specmoe_engine_new.argtypes = (c_int32, c_char_p)
    library.specmoe_engine_new.restype = c_void_p
    library.specmoe_engine_delete.argtypes = (c_void_p,)
    library.specmoe_engine_delete.restype = None
    library.specmoe_engine_set_threads.argtypes = (c_void_p, c_int32)
    library.specmoe_engine_set_threads.restype = None
    library.specmoe_engine_settle.argtypes = (c_void_p,)
    library.specmoe_engine_settle.restype = None
    library.specmoe_engine_kernels.argtypes = (c_void_p,)
    library.specmoe_engine_kernels.restype = c_char_p
    library.specmoe_engine_run.argtypes = (
        c_void_p,
        POINTER(ExpertSpec),
        POINTER(ExpertTask),
        c_int64,
        c_void_p,
        c_int64,
        c_void_p,
    )
    library.specmoe_engine_run.restype = c_int32
    _declare_steps(library)
    return library


def _declare_steps(library: CDLL) -> None:
    library.specmoe_cache_plan.argtypes = (
        *(POINTER(CacheTables), c_void_p, c_int64, c_void_p, c_int64, c_int32),
        *[c_void_p] * 3,
    )
    library.specmoe_cache_plan.restype = None
    library.specmoe_steps_new.argtypes = (
        c_void_p,
        POINTER(StepLayer),
        c_int64,
        POINTER(StepControl),
        c_int32,
        c_int32,
        POINTER(SpareRoom),
    )
    library.specmoe_steps_new.restype = c_void_p
    for name in ("enter", "leave"):
        function = getattr(library, f"specmoe_steps_{name}")
        function.argtypes, function.restype = (c_int64, c_void_p), None
    for name in ("delete", "lock", "unlock", "renew", "quiesce"):
        function = getattr(library, f"specmoe_steps_{name}")
        function.argtypes, function.restype = (c_void_p,), None
    library.specmoe_steps_busy_ns.argtypes = (c_void_p,)
    library.specmoe_steps_busy_ns.restype = c_int64
    library.specmoe_step_functions.argtypes = ()
    library.specmoe_step_functions.restype = c_void_p
    _declare_decisions(library)


def _declare_decisions(library: CDLL) -> None:
    """What only tests call by itself."""
    for name, arguments, result in (
        ("engine_attend", (c_void_p, c_void_p), None),
        ("alone_new", (), c_void_p),
        ("alone_delete", (c_void_p,), None),
        ("alone_of", (c_void_p,), c_void_p),
        ("alone_is", (c_void_p,), c_int32),
        ("alone_end", (c_void_p, c_void_p, c_int64), None),
        ("alone_ask", (c_void_p, c_void_p), None),
        ("idle_ns", (), c_double),
        ("judge_new", (c_int64,), c_void_p),
        ("judge_delete", (c_void_p,), None),
        ("judge_predicts", (c_void_p, c_int64), c_int32),
        ("judge_admitted", (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p), None),
        ("judge_measure", (c_void_p, c_int64, c_void_p, c_int64), None),
    ):
        function = getattr(library, f"specmoe_{name}")
        function.argtypes, function.restype = arguments, result


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    cores = cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no quota, or none that is told there
    return cores
