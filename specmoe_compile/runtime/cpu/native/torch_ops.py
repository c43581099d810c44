"""The ops in C++: compiling them against the torch that runs, and opening them.

They cannot be carried by a wheel that fits any torch, so that they are compiled at first use, into
the cache folder, by the compiler that Inductor needs anyway.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from ctypes import CDLL, c_void_p
from pathlib import Path

import torch

from specmoe_compile.runtime.cpu.native import build
from specmoe_compile.runtime.cpu.native.library import check_can_build
from specmoe_compile.system.machine import cache_folder

log = logging.getLogger(__name__)

_BUILD_BYTES = 600 << 20
"""RAM that compiling takes: 552 MiB (g++ 12, torch 2.13)."""

_lock = threading.Lock()


def use_native_steps(library: CDLL) -> bool:
    """Let the ops run steps in this library; False, with one warning, if they cannot.

    Args:
        library: the engine's.
    """
    with _lock:
        return _use(library)


@functools.cache
def _use(library: CDLL) -> bool:
    try:
        ops = ctypes.CDLL(str(_path()))
    except (build.BuildError, OSError) as error:
        log.warning(
            "Python takes the steps of the MoE layers and not ops in C++, which are faster: %s."
            " Results are the same.",
            error,
        )
        return False
    ops.specmoe_ops_use.argtypes = (c_void_p,)
    ops.specmoe_ops_use.restype = None
    ops.specmoe_ops_use(library.specmoe_step_functions())
    return True


def _path() -> Path:
    from torch.utils.cpp_extension import include_paths

    folder = cache_folder() / "native" / build.source_digest() / f"torch-{torch.__version__}"
    compiled = folder / build.TORCH_LIBRARY_NAME
    if not compiled.is_file():
        check_can_build(_BUILD_BYTES)
        log.warning("compiling the ops of the C++ engine once (half a minute): %s", compiled)
        libraries = str(Path(torch.__file__).resolve().parent / "lib")
        build.build_torch_ops(compiled, includes=include_paths(), libraries=libraries)
    return compiled
