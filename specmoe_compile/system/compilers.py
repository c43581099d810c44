"""The compilers that PyTorch calls: whether they are there, before anything long is begun."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

COMPILER_TIMEOUT_S = 60
"""What a question to a compiler may take."""
COMPILING_BYTES = 512 << 20
"""RAM that Inductor takes to compile for a CPU: 350 MiB of the C++ compiler, its own modules."""


def find_compiler_or_none() -> str | None:
    """Name of the C++ compiler that Inductor uses; None if it is not there.

    Inductor takes what CXX names, as one word and instead of any other, or its default.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return name if shutil.which(name) else None


@functools.cache
def compiler_version() -> str:
    """The C++ compiler's path and what it says of itself; empty where it cannot be asked."""
    compiler = find_compiler_or_none()
    if compiler is None:
        return ""
    try:
        said = subprocess.run(
            [compiler, "--version"],
            capture_output=True,
            timeout=COMPILER_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{compiler}\n{said.decode(errors='replace')}"


def answer_path_or_none(kind: str, *asked: str) -> Path | None:
    """Where the answer of this compiler is kept; None where it cannot be told from another."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    version = compiler_version()
    if not version:
        return None
    key = "\0".join((version, *asked))
    return Path(cache_dir()) / kind / hashlib.sha256(key.encode()).hexdigest()


def python_headers_found() -> bool:
    """Whether Python.h is there, which Inductor's C++ code includes."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def check_compiler(device_type: str) -> None:
    """Raise before a graph is compiled for a device that lacks its compiler.

    Args:
        device_type: "cpu", for which Inductor writes C++, or "cuda", for which Triton compiles the
            C code that launches its kernels.

    Raises:
        FileNotFoundError: there is none; the message says what to do.
    """
    if device_type == "cuda":
        what, packages, variable = "C compiler", "gcc", "CC"
        found = _first_or_none(os.environ.get("CC", ""), "gcc", "clang", "cc")
    else:
        what, packages, variable = "C++ compiler", "g++ and python3-dev", "CXX"
        found = find_compiler_or_none()
    if found is None:
        named = os.environ.get(variable)
        where = f"{variable} names {named!r}" if named else "none is on the path"
        raise FileNotFoundError(
            f"There is no {what}, which torch.compile needs: {where}. Install one (Debian,"
            f" Ubuntu: apt install {packages}), name one in {variable},"
            ' or do without compiling: --no-compile, or options={"lowering": "eager"}.'
        )


def _first_or_none(*names: str) -> str | None:
    return next((name for name in names if name and shutil.which(name.split()[0])), None)
