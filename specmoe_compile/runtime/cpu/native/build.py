"""Compiling `src/` into one shared library, with the compiler that Inductor needs anyway.

Used by `setup.py` for a wheel and at run time for a clone. So it imports nothing of this package,
and nothing that is not in the standard library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
TORCH_SOURCE = SOURCES.parent / "torch_src" / "ops.cpp"
LIBRARY_NAME = "_specmoe_native.so"
TORCH_LIBRARY_NAME = "_specmoe_torch_ops.so"
_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    # A multiplication and an addition are one instruction only where the source says so: the order
    # of sums is the same with every instruction set.
    "-ffp-contract=off",
    "-fno-math-errno",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_LOOPS = ("cache.cpp",)
"""What runs over all experts of a layer, and is half as fast where that is not vectorised."""
_VECTOR_FLAGS = {
    "rows_avx2.cpp": _AVX2,
    "rows_avx512.cpp": (*_AVX2, *_AVX512),
    "rows_bf16.cpp": (*_AVX2, *_AVX512, "-mavx512bf16", "-mavx512vbmi"),
}
_TIMEOUT_S = 600
_AT_ONCE = 3
"""Compilers at work at the same time; what `library.py` says about RAM is for so many."""


class BuildError(Exception):
    """There is no compiler, or it refused the sources; the text says which."""


def find_compiler() -> str:
    """Return the C++ compiler: `$CXX`, or the first of g++, clang++ and c++ on the path.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (found := _which(name)):
            return found
    raise BuildError("no C++ compiler on the path (g++ or clang++), and $CXX names none")


def _which(name: str) -> str | None:
    return shutil.which(name)


def source_digest() -> str:
    """A digest of all sources, flags and the machine, for the library's place in the cache."""
    digest = hashlib.sha256()
    for path in (*sorted(SOURCES.iterdir()), *sorted(TORCH_SOURCE.parent.iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (_FLAGS, _VECTOR_FLAGS, _LOOPS, sys.platform, platform.machine()):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def build(target: Path, *, extra_flags: tuple[str, ...] = ()) -> None:
    """Compile the sources, some at once, and put the library at `target` when it is complete.

    Args:
        target: file to write; its folder is made.
        extra_flags: for the compiler and the linker, such as sanitizers.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the folder cannot be written.
    """
    compiler = find_compiler()
    with _whole(target) as library:
        objects = _compile_all(compiler, library.parent, extra_flags)
        _run(
            [compiler, "-shared", "-pthread", *extra_flags, *map(str, objects), "-o", str(library)]
        )


def build_torch_ops(target: Path, *, includes: Sequence[str], libraries: str) -> None:
    """Compile the ops that torch calls, and put it at `target` when it is complete.

    Args:
        target: file to write; its folder is made.
        includes: folders of torch's headers.
        libraries: folder of torch's libraries.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the folder cannot be written.
    """
    compiler = find_compiler()
    with _whole(target) as library:
        _run(
            [
                # torch's headers need C++20 since 2.15; the last -std counts.
                *(compiler, *_FLAGS, "-std=c++20", "-O1", "-shared"),
                *(f"-isystem{folder}" for folder in includes),
                *(str(TORCH_SOURCE), "-o", str(library)),
                *(f"-L{libraries}", "-ltorch_cpu", "-lc10"),
            ]
        )


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A file in a folder of its own, which takes its place at `target` once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        library = Path(folder) / target.name
        yield library
        os.replace(library, target)


def _compile_all(compiler: str, folder: Path, extra_flags: tuple[str, ...]) -> list[Path]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    # What takes longest begins first.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: source.name not in _VECTOR_FLAGS)
    targets = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        vector = _VECTOR_FLAGS.get(source.name, ()) if is_x86 else ()
        level = "-O3" if vector or source.name in _LOOPS else "-O2"
        command = [compiler, *_FLAGS, level, *vector, *extra_flags]
        _run([*command, "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(compile_one, sources, targets))
    return targets


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
