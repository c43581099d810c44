"""C++ kernels go to the compiler while Inductor writes the rest of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import async_compile, codecache
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.utils import fresh_cache

from specmoe_compile.system.early_kernels import kernels_compiled_early

Asked = list[tuple[bool, tuple[Any, ...]]]


def two_kernels(x: torch.Tensor) -> torch.Tensor:
    """A kernel before and another one after a product that is no kernel of Inductor's."""
    return ((x.sin() + 1) @ x).cos() * 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Kernels asked for, in order: whether ahead, and the types of arguments and the source."""
    torch._dynamo.reset()
    seen: Asked = []
    loading: list[bool] = []
    inductors, inductors_load = AsyncCompile.cpp_pybinding, codecache.PyCodeCache.load_by_key_path

    def cpp_pybinding(self: Any, *args: Any) -> Any:
        seen.append((not loading, args))
        return inductors(self, *args)

    def load_by_key_path(*args: Any, **kwargs: Any) -> Any:
        loading.append(True)
        return inductors_load(*args, **kwargs)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", cpp_pybinding)
    monkeypatch.setattr(codecache.PyCodeCache, "load_by_key_path", load_by_key_path)
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 2)
    with fresh_cache():
        yield seen
    torch._dynamo.reset()


def compiled() -> torch.Tensor:
    x = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    with torch.no_grad():
        got: torch.Tensor = torch.compile(
            two_kernels, backend="specmoe", options={"strict": False}
        )(x)
        torch.testing.assert_close(got, two_kernels(x))
    return got


def test_each_kernel_is_asked_for_ahead_in_the_words_of_inductors_code(asked: Asked) -> None:
    before = PythonWrapperCodegen.define_kernel
    compiled()
    ahead = [args for is_ahead, args in asked if is_ahead]
    assert len(ahead) == 2
    assert [args for is_ahead, args in asked if not is_ahead] == ahead
    assert PythonWrapperCodegen.define_kernel is before


def test_each_kernel_is_compiled_once(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    inductors = codecache.CppBuilder.build

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(self.get_target_file_path())
        return inductors(self, *args, **kwargs)

    monkeypatch.setattr(codecache.CppBuilder, "build", build)
    compiled()
    libraries = [path for path in built if path.endswith(".so")]
    assert len(libraries) == 2 == len(set(libraries))


def test_what_goes_wrong_ahead_is_left_to_inductors_code(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    inductors = AsyncCompile.cpp_pybinding
    failed: list[bool] = []

    def fails_at_first(self: Any, *args: Any) -> Any:
        if len(failed) < 2:
            failed.append(True)
            raise RuntimeError("no compiler")
        return inductors(self, *args)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", fails_at_first)
    compiled()
    assert [is_ahead for is_ahead, _ in asked] == [False, False]


def test_an_error_leaves_inductors_own_way_in_place() -> None:
    before = PythonWrapperCodegen.define_kernel
    with pytest.raises(ValueError, match="stop"), kernels_compiled_early():
        assert PythonWrapperCodegen.define_kernel is not before
        raise ValueError("stop")
    assert PythonWrapperCodegen.define_kernel is before
