"""Inductor's settings on a CPU."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch._inductor import config, cpu_vec_isa
from torch._inductor.cpu_vec_isa import VecISA, x86_isa_checker

from specmoe_compile.system import inductor
from specmoe_compile.system.compilers import compiler_version
from specmoe_compile.system.inductor import (
    ask_compiler_ahead,
    compiler_takes_vector_flags,
    cpu_settings,
    list_vector_sets,
)

ask = compiler_takes_vector_flags.__wrapped__
list_sets = list_vector_sets.__wrapped__


def compiler(folder: Path, script: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not x86_isa_checker(), reason="not an x86 processor")
def test_the_compiler_is_asked_for_what_the_processor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, f'echo "$@" > {tmp_path}/flags'))
    assert ask()
    flags = (tmp_path / "flags").read_text().split()
    assert {"-mavx2", "-fsyntax-only"} <= set(flags)
    assert ("-mavx512f" in flags) == ("avx512" in x86_isa_checker())


def test_a_compiler_that_refuses_them_leaves_the_answer_to_inductor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    assert not ask()


def test_a_compiler_that_cannot_run_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c++"
    path.write_bytes(b"\x7fELF nothing")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert not ask()


@pytest.mark.parametrize("said", [True, False])
def test_what_the_user_said_stays(said: bool) -> None:
    with config.patch({"cpp.vec_isa_ok": said, "cpp.min_chunk_size": 1 << 20}):
        settings = cpu_settings()
    assert "cpp.vec_isa_ok" not in settings
    assert settings["cpp.min_chunk_size"] == 1 << 20


def test_the_compiler_is_asked_in_another_thread_and_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_for, answer = threading.Event(), threading.Event()

    def takes() -> bool:
        asked_for.set()
        return answer.wait(timeout=60)

    monkeypatch.setattr(inductor, "compiler_takes_vector_flags", takes)
    monkeypatch.setattr(inductor, "list_vector_sets", lambda: None)
    monkeypatch.setattr(inductor, "ask_compiler_ahead", cache(ask_compiler_ahead.__wrapped__))
    inductor.ask_compiler_ahead()
    assert asked_for.wait(timeout=60), "before the settings are asked for"
    threading.Timer(0.1, answer.set).start()
    with config.patch({"cpp.vec_isa_ok": None}):
        assert cpu_settings()["cpp.vec_isa_ok"] is True
    assert not inductor.ask_compiler_ahead().is_alive()


def test_every_setting_is_known_to_inductor() -> None:
    with config.patch(cpu_settings()):
        assert config.inplace_buffers is False


@pytest.mark.parametrize("name", ["size_asserts", "alignment_asserts"])
def test_inductors_checks_are_left_out_unless_the_user_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"TORCHINDUCTOR_{name.upper()}"
    monkeypatch.delenv(variable, raising=False)
    assert cpu_settings()[name] is False
    monkeypatch.setenv(variable, "1")
    assert name not in cpu_settings()


class Part(VecISA):
    """A part of an instruction set, of which Inductor asks whatever `vec_isa_ok` says."""

    def __init__(self, code: str) -> None:
        self._code = code
        self.there = False

    def build_arch_flags(self) -> str:
        return "-DASKED=1"

    def __bool__(self) -> bool:
        self.there = self.check_build(self._code)
        return super().__bool__() and self.there


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that Inductor was left to build and load, which is said to fail."""
    programs: list[str] = []

    def check_build(isa: VecISA, code: str) -> bool:
        programs.append(code)
        return False

    monkeypatch.setattr(VecISA, "check_build", check_build)
    return programs


def listed(part: Part, monkeypatch: pytest.MonkeyPatch) -> Part:
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: [part] if part else [])
    before = VecISA.check_build
    list_sets()
    assert VecISA.check_build is before
    return part


def test_what_compiles_is_not_built_and_loaded(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "#ifndef ASKED\n#error without the flags\n#endif\nint f() { return 1; }\n"
    assert listed(Part(code), monkeypatch).there
    assert not asked


def test_what_compiled_once_is_remembered_for_this_compiler(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    ran = tmp_path / "ran"
    says = '[ "$1" = --version ] && { echo "one 1.0"; exit; }'
    monkeypatch.setenv("CXX", compiler(tmp_path, f"{says}\necho >> {ran}; cat > /dev/null"))
    compiler_version.cache_clear()
    for _ in range(2):
        assert listed(Part("int f() { return 2; }"), monkeypatch).there
    assert len(ran.read_text().splitlines()) == 1
    Path(tmp_path / "c++").write_text(f'#!/bin/sh\necho "two 2.0"; echo >> {ran}\n')
    compiler_version.cache_clear()
    assert listed(Part("int f() { return 2; }"), monkeypatch).there
    assert len(ran.read_text().splitlines()) == 3, "another compiler's version, and its answer"
    compiler_version.cache_clear()
    assert not asked


def test_what_does_not_compile_is_left_to_inductor(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not listed(Part("#error no such intrinsic"), monkeypatch).there
    assert asked == ["#error no such intrinsic"]


def test_an_error_leaves_inductors_own_question_in_place(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        raise RuntimeError("no list")

    before = VecISA.check_build
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", fails)
    with pytest.raises(RuntimeError, match="no list"):
        list_sets()
    assert VecISA.check_build is before


@pytest.mark.skipif(not x86_isa_checker(), reason="not an x86 processor")
def test_the_same_sets_are_listed_as_by_inductor() -> None:
    def found() -> list[tuple[str, str]]:
        return [(str(isa), isa.build_arch_flags()) for isa in cpu_vec_isa.valid_vec_isa_list()]

    def forget() -> None:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        for isa in cpu_vec_isa.supported_vec_isa_list:
            for owner in type(isa).__mro__:
                getattr(owner.__dict__.get("__bool__"), "cache_clear", lambda: None)()

    forget()
    with config.patch({"cpp.vec_isa_ok": True}):
        expected = found()
    forget()
    list_sets()
    assert found() == expected
