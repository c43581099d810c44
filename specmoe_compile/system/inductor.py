"""How Inductor is set up: less to compile before the second token, less host time on a CPU."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmoe_compile.system.compilers import (
    COMPILER_TIMEOUT_S,
    answer_path_or_none,
    find_compiler_or_none,
)
from specmoe_compile.system.quick_links import empty_libraries_or_none

log = logging.getLogger(__name__)

MIN_PARALLEL_ELEMENTS = 16384
"""Elements of a loop per thread, below which OpenMP's threads do not pay on a CPU: Inductor's own
bound of 512 is a tenth of a microsecond of work, and a parallel region costs several, or a slice of
the scheduler where another process has one of the cores."""

_ASSERTS = {
    "size_asserts": "TORCHINDUCTOR_SIZE_ASSERTS",
    "alignment_asserts": "TORCHINDUCTOR_ALIGNMENT_ASSERTS",
}
"""Checks that Inductor's code makes of each tensor in each call, and what switches them by hand."""

_listing = threading.Lock()


def cpu_settings() -> dict[str, Any]:
    """Return what is set of Inductor's configuration while a graph for a CPU is compiled.

    What the user set by Inductor's environment variables stays.
    """
    from torch._inductor import config

    settings: dict[str, Any] = {
        # TORCHINDUCTOR_CPP_MIN_CHUNK_SIZE
        "cpp.min_chunk_size": max(MIN_PARALLEL_ELEMENTS, config.cpp.min_chunk_size),
        # The stream of residuals is rounded and stored after each layer, as the model does it, and
        # no argument is written in place: then the layers' kernels are the same source, compiled
        # once. Else the sums of one to four layers are kernels of their own, in two orders of
        # arguments.
        "realize_reads_threshold": 1,
        "inplace_buffers": False,
    }
    # Dynamo's guards know the sizes of what comes in, fake ops those in between.
    for name, variable in _ASSERTS.items():
        if variable not in os.environ:
            settings[name] = False
    if config.cpp.vec_isa_ok is None:
        ask_compiler_ahead().join()
        if compiler_takes_vector_flags():
            settings["cpp.vec_isa_ok"] = True
    return settings


@functools.cache
def ask_compiler_ahead() -> threading.Thread:
    """Ask the C++ compiler what `cpu_settings` needs to know, in a thread; once in a process.

    It answers in processes of its own, so that another thread can trace a model meanwhile, and
    makes what kernels are linked with (`quick_links`). Threads read what identifies PyTorch and
    Triton in Inductor's caches as well, where PyTorch has them.
    """
    # Imported here, as two threads that import at once may find half a module.
    from torch._inductor import codecache, cpu_vec_isa  # noqa: F401

    for key in ("torch_key", "triton_key"):
        getattr(getattr(codecache, key, None), "prefetch", lambda: None)()

    def ask() -> None:
        if compiler_takes_vector_flags():
            list_vector_sets()
        empty_libraries_or_none()

    thread = threading.Thread(target=ask, name="specmoe-asks-compiler", daemon=True)
    thread.start()
    return thread


@functools.cache
def start_compile_workers() -> None:
    """Start the processes that compile Inductor's Triton kernels; once in a process.

    Inductor's own backend does so when it is first used. Kernels that are written before the
    processes are ready are compiled one after the other, by the process that writes them.
    """
    from torch._inductor import async_compile

    getattr(async_compile, "maybe_warm_pool", lambda: None)()


@functools.cache
def compiler_takes_vector_flags() -> bool:
    """Return whether the C++ compiler takes the flags of each instruction set of this processor.

    Inductor finds out by a program for each, which it compiles with torch's headers and loads: 3 s
    each with empty caches. The flags alone take hundredths. False where it cannot be said; Inductor
    asks in its own way then.
    """
    try:
        from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

        there = x86_isa_checker()
        names = [isa for isa in supported_vec_isa_list if set(str(isa).split()) <= set(there)]
        flags = [flag for isa in names for flag in shlex.split(isa.build_arch_flags())]
    except (ImportError, AttributeError) as error:  # a PyTorch that has them elsewhere
        log.debug("Inductor's instruction sets are not where they were: %s", error)
        return False
    return bool(names) and _is_accepted("", [*flags, "-fsyntax-only"])


@functools.cache
def list_vector_sets() -> None:
    """Let Inductor list the processor's instruction sets, which it does once per process.

    Whatever `vec_isa_ok` says it asks about parts of AVX-512 and AMX by a program for each, which
    it compiles, links and loads in a process of its own: 2.5 s each, in every process, with a torch
    that imports itself there. Loading shows nothing that compiling has not: the programs call no
    library. So they are compiled only; what does not compile is asked in Inductor's own way.
    """
    try:
        from torch._inductor import config, cpu_vec_isa

        sets: Any = cpu_vec_isa.VecISA
        valid_vec_isa_list = cpu_vec_isa.valid_vec_isa_list
        inductors = sets.check_build
    except (ImportError, AttributeError) as error:  # a PyTorch that has them elsewhere
        log.debug("Inductor's instruction sets are not where they were: %s", error)
        return

    def check_build(isa: Any, code: str) -> bool:
        return _compiles(code, isa.build_arch_flags()) or bool(inductors(isa, code))

    with _listing, config.patch({"cpp.vec_isa_ok": True}):
        sets.check_build = check_build
        try:
            valid_vec_isa_list()
        finally:
            sets.check_build = inductors


def _compiles(code: str, flags: str) -> bool:
    """Whether the C++ compiler makes an object file of `code`; False where it cannot be asked.

    That it does is remembered beside Inductor's compiled code, for later processes.
    """
    known = answer_path_or_none("specmoe_probes", code, flags)
    if known is not None and known.exists():
        return True
    with tempfile.TemporaryDirectory(prefix="specmoe-") as folder:
        target = str(Path(folder) / "probe.o")
        accepted = _is_accepted(code, [*shlex.split(flags), "-c", "-o", target])
    if accepted and known is not None:
        with contextlib.suppress(OSError):  # asked again then
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()
    return accepted


def _is_accepted(code: str, arguments: Sequence[str]) -> bool:
    """Whether the C++ compiler takes `code` with these arguments; False where none can be asked."""
    compiler = find_compiler_or_none()
    if compiler is None:
        return False
    try:
        done = subprocess.run(
            [compiler, *arguments, "-x", "c++", "-"],
            input=code.encode(),
            capture_output=True,
            timeout=COMPILER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s cannot be asked: %s", compiler, error)
        return False
    return done.returncode == 0
