"""Which C++ compiler there is, as Inductor sees it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from torch._inductor import config, cpp_builder, exc

from specmoe_compile.system.compilers import check_compiler, find_compiler_or_none


def inductors_or_none() -> str | None:
    """Inductor's compiler; its configuration reads CXX in these words when it is imported."""
    named = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    cpp_builder.cpp_compiler_search.cache_clear()  # it remembers what another path had
    with config.patch({"cpp.cxx": (None, named)}):
        try:
            return cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return None
        finally:
            cpp_builder.cpp_compiler_search.cache_clear()


def put(folder: Path, name: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


@pytest.mark.parametrize("named", [None, "other", "nowhere", "ccache g++", "/no/where/g++"])
@pytest.mark.parametrize("there", [(), ("g++",), ("clang++", "c++")])
def test_the_compiler_is_inductors(
    there: tuple[str, ...], named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*there, "ccache", "other"):
        put(tmp_path, name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TORCH_INDUCTOR_INSTALL_GXX", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    assert find_compiler_or_none() == inductors_or_none()


def test_a_named_compiler_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/where/g++")
    with pytest.raises(FileNotFoundError, match="CXX names '/no/where/g\\+\\+'"):
        check_compiler("cpu")


def test_without_a_compiler_the_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="none is on the path"):
        check_compiler("cpu")
