"""Kernels that Inductor compiles for a CPU are linked without reading PyTorch's libraries.

For each kernel the linker reads the names of all that PyTorch's libraries hold, which takes a
quarter of the kernel's time. But a kernel is loaded into a process that has these libraries, and
the loader finds them there by their names. So it is linked with empty libraries of the same names.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specmoe_compile.system.compilers import (
    COMPILER_TIMEOUT_S,
    answer_path_or_none,
    find_compiler_or_none,
)

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torch_cpu", "torch_python")
_PROBE = """
extern "C" int aoti_torch_device_type_cpu();
extern "C" int specmoe_probe() { return aoti_torch_device_type_cpu(); }
"""
"""Calls a function of libtorch_cpu."""


@contextlib.contextmanager
def kernels_linked_quickly() -> Iterator[None]:
    """Have Inductor link the C++ kernels of this block with empty libraries.

    Where that cannot be, or fails, it links as ever; in its cache both are the same kernel.
    """
    try:
        from torch._inductor import cpp_builder

        builder: Any = cpp_builder
        inductors = builder.run_compile_cmd
    except (ImportError, AttributeError) as error:  # a PyTorch that has it elsewhere
        log.debug("Inductor's compiler is not where it was: %s", error)
        yield
        return

    def run_compile_cmd(cmd_line: str, *args: Any, **kwargs: Any) -> Any:
        quick = _quick_or_none(shlex.split(cmd_line))
        if quick is not None:
            try:
                return inductors(quick, *args, **kwargs)
            except Exception as error:
                log.debug("linked with PyTorch's libraries: %s", error)
        return inductors(cmd_line, *args, **kwargs)

    builder.run_compile_cmd = run_compile_cmd
    try:
        yield
    finally:
        builder.run_compile_cmd = inductors


def _quick_or_none(command: Sequence[str]) -> str | None:
    """The command with empty libraries; None for one that does not link a kernel."""
    names = [f"-l{name}" for name in _LIBRARIES]
    if "-shared" not in command or not set(names) <= set(command):
        return None
    folder = empty_libraries_or_none()
    if folder is None:
        return None
    linked = [part for arg in command for part in (_kept(arg) if arg in names else (arg,))]
    # The first folder that has a library of a name counts.
    return shlex.join([linked[0], f"-L{folder}", *linked[1:]])


def _kept(library: str) -> tuple[str, ...]:
    """Name a library in what is linked, though nothing is found in it."""
    return "-Wl,--push-state,--no-as-needed", library, "-Wl,--pop-state"


@functools.cache
def empty_libraries_or_none() -> Path | None:
    """Folder of the empty libraries, made where it is not there; None where they do not do."""
    compiler = find_compiler_or_none()
    folder = answer_path_or_none("specmoe_links", _PROBE, *_LIBRARIES)
    if not sys.platform.startswith("linux") or compiler is None or folder is None:
        return None
    try:
        if not folder.is_dir():
            _make(folder, compiler)
        ctypes.CDLL(str(folder / "probe.so")).specmoe_probe()
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.debug("kernels are linked with PyTorch's libraries: %s", error)
        return None
    return folder


def _make(folder: Path, compiler: str) -> None:
    """Compile the empty libraries, and one that needs PyTorch's to be loaded."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / "made"
        made.mkdir()

        def link(target: str, source: str, *arguments: str) -> None:
            command = [compiler, "-shared", "-fPIC", "-o", target, "-x", "c++", "-", "-x", "none"]
            subprocess.run(
                [*command, *arguments],
                input=source.encode(),
                cwd=made,
                capture_output=True,
                timeout=COMPILER_TIMEOUT_S,
                check=True,
            )

        for name in _LIBRARIES:
            link(f"lib{name}.so", "", f"-Wl,-soname,lib{name}.so")
        libraries = [part for name in _LIBRARIES for part in _kept(f"-l{name}")]
        link("probe.so", _PROBE, "-L.", *libraries)
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(folder)
