"""A device guard for CUDA that does nothing, for machines without a GPU.

Fake tensors on device cuda need no GPU, but PyTorch's Python bindings switch to a tensor's device
around some calls, indexing among them, and without CUDA there is nothing to switch with.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""


def install_cuda_guard(folder: Path, compiler: str) -> None:
    """Build the guard in a folder and load it into this process.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
    """
    source, library = folder / "cuda_guard.cpp", folder / "libcuda_guard.so"
    source.write_text(_SOURCE)
    command = [compiler, "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(library)]
    command += [f"-I{path}" for path in include_paths()]
    command += [*(f"-L{path}" for path in library_paths()), "-lc10"]
    subprocess.run(command, check=True, capture_output=True)
    ctypes.CDLL(str(library))
