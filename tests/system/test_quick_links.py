"""Kernels linked with empty libraries: the same results, and as ever where that cannot be."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.utils import fresh_inductor_cache

from specmoe_compile.system import quick_links
from specmoe_compile.system.quick_links import empty_libraries_or_none, kernels_linked_quickly

COMMAND = "g++ k.cpp -shared -o k.so -ltorch -ltorch_cpu -ltorch_python -lgomp -L/torch/lib"


@pytest.fixture(autouse=True)
def _new_caches() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_inductor_cache():
        empty_libraries_or_none.cache_clear()
        yield
    empty_libraries_or_none.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that link kernels, as they run."""
    found: list[list[str]] = []
    run = cpp_builder._run_compile_cmd

    def noting(cmd_line: str, *args: Any) -> None:
        command = shlex.split(cmd_line)
        if "-shared" in command:
            found.append(command)
        run(cmd_line, *args)

    monkeypatch.setattr(cpp_builder, "_run_compile_cmd", noting)
    return found


def waves(x: torch.Tensor) -> torch.Tensor:
    """Sines of vectors are functions of PyTorch's library, which a kernel calls."""
    return torch.sin(x) * 2 + torch.exp(x)


def check_waves() -> None:
    x = torch.linspace(-3, 3, 1001)
    compiled = torch.compile(waves, backend="specmoe", options={"strict": False})
    torch.testing.assert_close(compiled(x), waves(x))


def test_a_kernel_that_calls_pytorch_is_linked_with_empty_libraries(
    linked: list[list[str]],
) -> None:
    check_waves()
    folder = empty_libraries_or_none()
    assert folder is not None
    (command,) = linked
    places = [part for part in command if part.startswith("-L")]
    assert places[0] == f"-L{folder}" and len(places) > 1
    assert (folder / "libtorch_cpu.so").stat().st_size < 100_000


def test_what_cannot_be_linked_so_is_linked_as_ever(
    linked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libtorch_cpu.so").write_text("not a library\n")
    monkeypatch.setattr(quick_links, "empty_libraries_or_none", lambda: tmp_path)
    check_waves()
    quick, inductors = linked
    assert f"-L{tmp_path}" in quick and f"-L{tmp_path}" not in inductors


def test_without_empty_libraries_inductor_links(
    linked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_links, "find_compiler_or_none", lambda: None)
    assert empty_libraries_or_none() is None
    empty_libraries_or_none.cache_clear()
    check_waves()
    (command,) = linked
    assert not any("specmoe_links" in part for part in command)


@pytest.mark.parametrize(
    "other",
    [
        COMMAND.replace("-shared", "-c"),
        COMMAND.replace("-ltorch_cpu", ""),
        "g++ header.h -o header.h.gch",
    ],
)
def test_other_commands_stay(other: str) -> None:
    assert quick_links._quick_or_none(shlex.split(other)) is None


def test_libraries_are_kept_in_what_is_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_links, "empty_libraries_or_none", lambda: Path("/a folder"))
    quick = quick_links._quick_or_none(shlex.split(COMMAND))
    assert quick is not None
    words = shlex.split(quick)
    assert words[:3] == ["g++", "-L/a folder", "k.cpp"]
    at = words.index("-ltorch_cpu")
    assert words[at - 1] == "-Wl,--push-state,--no-as-needed"
    assert words[at + 1] == "-Wl,--pop-state"
    kept = [word for word in words[1:] if word not in (words[1], words[at - 1], words[at + 1])]
    assert ["g++", *kept] == shlex.split(COMMAND), "nothing is lost"


def test_they_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = empty_libraries_or_none()
    empty_libraries_or_none.cache_clear()
    monkeypatch.setattr(quick_links, "_make", lambda *_: pytest.fail("made again"))
    assert folder is not None and empty_libraries_or_none() == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name], "no rests"


def test_libraries_that_do_not_do_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = quick_links._PROBE.replace("aoti_torch_device_type_cpu", "found_nowhere")
    monkeypatch.setattr(quick_links, "_PROBE", probe)
    assert empty_libraries_or_none() is None


def test_the_block_leaves_inductor_as_it_was() -> None:
    inductors = cpp_builder.run_compile_cmd
    with kernels_linked_quickly():
        assert cpp_builder.run_compile_cmd is not inductors
    assert cpp_builder.run_compile_cmd is inductors
