"""How Inductor is set up for a CPU: less to compile before the second token, less host time."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import subprocess
from typing import Any

from specmoe_compile.system.compilers import find_compiler_or_none

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

_COMPILER_TIMEOUT_S = 60


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
    if config.cpp.vec_isa_ok is None and compiler_takes_vector_flags():
        settings["cpp.vec_isa_ok"] = True
    return settings


@functools.cache
def compiler_takes_vector_flags() -> bool:
    """Return whether the C++ compiler takes the flags of each instruction set of this processor.

    Inductor finds out by a program for each, which it compiles with torch's headers and loads: 3 s
    each with empty caches. The flags alone take hundredths. False where it cannot be said; Inductor
    asks in its own way then.
    """
    compiler = find_compiler_or_none()
    if compiler is None:
        return False
    try:
        from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

        there = x86_isa_checker()
        names = [isa for isa in supported_vec_isa_list if set(str(isa).split()) <= set(there)]
        flags = [flag for isa in names for flag in shlex.split(isa.build_arch_flags())]
    except (ImportError, AttributeError) as error:  # a PyTorch that has them elsewhere
        log.debug("Inductor's instruction sets are not where they were: %s", error)
        return False
    if not names:
        return False
    try:
        done = subprocess.run(
            [*shlex.split(compiler), *flags, "-fsyntax-only", "-x", "c++", "-"],
            input=b"",
            capture_output=True,
            timeout=_COMPILER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s cannot be asked: %s", compiler, error)
        return False
    return done.returncode == 0
