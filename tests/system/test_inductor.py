"""Inductor's settings on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor import config
from torch._inductor.cpu_vec_isa import x86_isa_checker

from specmoe_compile.system.inductor import compiler_takes_vector_flags, cpu_settings

ask = compiler_takes_vector_flags.__wrapped__


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
