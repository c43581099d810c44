"""Compiles the C++ engine into wheels, where there is a compiler; pyproject.toml says all else.

Without one the wheel is pure Python, and the engine is compiled at first use. An editable install
does so, too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_NATIVE = Path("specmoe_compile/runtime/cpu/native")


def _load_build() -> Any:
    """The module that compiles, without importing the package, which needs torch."""
    path = Path(__file__).resolve().parent / _NATIVE / "build.py"
    spec = importlib.util.spec_from_file_location("specmoe_native_build", path)
    assert spec is not None and spec.loader is not None, f"{path} is a module"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()


def _has_compiler() -> bool:
    try:
        build.find_compiler()
    except build.BuildError as error:
        print(f"specmoe: {error}: this wheel carries no C++ engine", file=sys.stderr)
        return False
    return True


class BuildWithEngine(build_py):
    """Copies the package and compiles the engine beside its sources."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode and _has_compiler():
            build.build(Path(self.build_lib).resolve() / _NATIVE / build.LIBRARY_NAME)


class EngineDistribution(Distribution):
    """A distribution that is bound to a platform if it carries the engine."""

    def has_ext_modules(self) -> bool:
        return _has_compiler()


class EngineWheel(bdist_wheel):
    """A wheel for any Python 3: the engine knows neither Python's nor torch's interface."""

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        return ("py3", "none", tag[2])


setup(
    distclass=EngineDistribution,
    cmdclass={"build_py": BuildWithEngine, "bdist_wheel": EngineWheel},
)
