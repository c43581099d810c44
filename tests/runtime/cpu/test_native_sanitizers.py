"""The C++ engine's tests once more, with address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specmoe_compile.runtime.cpu.native import build

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
ROOT = Path(__file__).resolve().parents[3]


def runtime_library(name: str) -> str:
    """Path of a sanitizer's runtime, which has to be loaded before Python."""
    done = subprocess.run(
        [build.find_compiler(), f"-print-file-name={name}"],
        capture_output=True,
        text=True,
        check=True,
    )
    path = done.stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"the compiler has no {name}")
    return path


@pytest.mark.slow
def test_the_engine_under_sanitizers(tmp_path: Path) -> None:
    folder = tmp_path / "specmoe" / "native" / build.source_digest()
    build.build(folder / build.LIBRARY_NAME, extra_flags=FLAGS)
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": ":".join(map(runtime_library, ("libasan.so", "libubsan.so"))),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    tests = [
        f"tests/runtime/cpu/test_native_{name}.py"
        for name in (
            "alone",
            "kernels",
            "products",
            "attention",
            "session",
            "policy",
            "steps",
            "speculation",
        )
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
