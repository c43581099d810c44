"""What a user can get wrong at the command line, or lack: one sentence, status 2, nothing begun."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import specmoe_compile
from specmoe_compile.cli.main import run
from specmoe_compile.errors import CompileError
from specmoe_compile.system import compilers
from specmoe_compile.system.output import check_writable, sentence, user_error_or_none, write_json
from specmoe_compile.system.sizes import parse_size
from tests.cli.test_main import complaint
from tests.helpers import PATIENCE_S, save_tiny


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint without tokenizer files."""
    return str(save_tiny(tmp_path_factory.mktemp("untold") / "model"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a tokenizer of letters that drops everything else."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny(tmp_path_factory.mktemp("told") / "model")
    letters = {letter: index for index, letter in enumerate("abcdefgh")}
    tokenizer = Tokenizer(models.BPE(letters, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure of the test."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(specmoe_compile, "from_pretrained", load)


def generate(*arguments: str) -> tuple[str, ...]:
    return ("generate", *arguments, "--no-compile")


@pytest.mark.usefixtures("no_model")
def test_a_checkpoint_without_a_tokenizer(untold: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokenizer.json" in complaint(capsys, *generate(untold, "--prompt", "hello"))


@pytest.mark.usefixtures("no_model")
def test_a_tokenizer_that_is_damaged(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in Path(checkpoint).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    assert "tokenizer.json" in complaint(capsys, *generate(str(tmp_path), "--prompt", "a"))


@pytest.mark.usefixtures("no_model")
def test_a_prompt_without_tokens(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "once it is tokens" in complaint(capsys, *generate(checkpoint, "--prompt", "???"))


@pytest.mark.usefixtures("no_model")
def test_a_prompt_that_is_not_utf8(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argument = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python hands it over
    assert "not UTF-8" in complaint(capsys, *generate(checkpoint, "--prompt", argument))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "not UTF-8" in complaint(capsys, *generate(checkpoint, "--prompt", "-"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seed", "9" * 20), "--seed"),
        (("--max-new-tokens", "9" * 30), "--max-new-tokens"),
        (("--temperature", "nan"), "--temperature"),
        (("--temperature", "inf"), "--temperature"),
        (("--temperature", "1e-300"), "--temperature"),
        (("--threads", "9" * 9), "--threads"),
        (("--store-dir", ""), "--store-dir is empty"),
        (("--store-dir=",), "--store-dir is empty"),
        (("--json", ""), "--json is empty"),
        (("--trace=",), "--trace is empty"),
    ],
)
def test_absurd_numbers_and_empty_paths(
    checkpoint: str,
    arguments: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in complaint(capsys, *generate(checkpoint, "--prompt", "a", *arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--record-mib", "inf"),
        ("doctor", "--seconds", "nan"),
        ("doctor", "--file-mib", "9" * 25),
        ("replay", "x", "--link-gbps", "nan"),
        ("bench", "x", "--new-tokens", "9" * 25),
        ("bench", "x", "--expert-cache", "9" * 400 + "GiB"),
        ("pack", ""),
    ],
)
def test_absurd_numbers_and_empty_names_of_other_commands(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(complaint(capsys, *arguments)) < 200


def test_more_tokens_than_the_model_has_positions(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = generate(checkpoint, "--prompt", "ab", "--max-new-tokens", "255")
    command = (*command, "--store-dir", str(tmp_path / "store"))
    assert "256 positions: give at most 254" in complaint(capsys, *command)


def test_a_size_beyond_every_machine() -> None:
    with pytest.raises(ValueError, match="more than any machine has"):
        parse_size("9" * 400 + "%", total_bytes=1)


@pytest.mark.usefixtures("no_model")
def test_without_a_compiler_nothing_is_loaded(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers.shutil, "which", lambda name: None)
    said = complaint(capsys, "generate", checkpoint, "--prompt", "a", "--device", "cpu")
    assert "C++ compiler" in said and "--no-compile" in said
    said = complaint(capsys, "generate", checkpoint, "--prompt", "a", "--device", "cuda")
    assert "no C compiler" in said
    assert "C++ compiler" in complaint(capsys, "demo")


def test_without_a_compiler_the_backend_says_so(
    untold: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = specmoe_compile.from_pretrained(
        untold, device="cpu", store_dir=tmp_path, progress=False
    )
    monkeypatch.setattr(compilers.shutil, "which", lambda name: None)
    compiled = torch.compile(model, backend="specmoe")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught, torch.no_grad():
        compiled(torch.tensor([[1, 2, 3]]))
    assert isinstance(caught.value.inner_exception, CompileError)
    assert "C++ compiler" in sentence(caught.value.inner_exception)


def test_a_missing_package_is_named_and_our_own_modules_are_not_excused() -> None:
    missing = ModuleNotFoundError("No module named 'gguf.x'", name="gguf.x")
    assert user_error_or_none(missing) is missing
    assert sentence(missing).startswith("The Python package 'gguf' is missing")
    several = ImportError("\nXTokenizer requires\n the sentencepiece library\n")
    assert sentence(several) == "XTokenizer requires the sentencepiece library."
    assert user_error_or_none(ImportError("no", name="specmoe_compile.nonsense")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 4096 bytes. Error code 12",
            "you tried to allocate 4096 bytes; lower --expert-cache",
        ),
        (
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10"
            " GiB of which 1.23 GiB is free. Process 1 has",
            "tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which"
            " 1.23 GiB is free; lower --expert-cache",
        ),
    ],
)
def test_too_little_memory_says_how_much_and_what_to_lower(text: str, expected: str) -> None:
    error = RuntimeError(text)
    assert user_error_or_none(error) is error
    assert expected in sentence(error)
    assert user_error_or_none(RuntimeError("a bug")) is None


def test_a_terminal_that_is_not_utf8_shows_what_it_can() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specmoe_compile.cli.main", "generate", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--prompt" in done.stdout


def test_a_reader_that_has_enough_is_no_error() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "specmoe_compile.cli.main", "--help"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert done.stderr == b""
    assert done.returncode in (1, 141)  # rich ends with 1 where it was the one that wrote


def test_json_goes_through_a_link_and_keeps_permissions(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_json(link, {"a": 1})  # nothing there yet
    target.chmod(0o640)
    write_json(link, {"a": 2})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 2}
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_json_to_a_file_with_two_names_reaches_both(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old and much longer than what comes")
    second.hardlink_to(first)
    write_json(second, 3)
    assert json.loads(first.read_text()) == 3


def test_json_to_a_pipe_is_read_at_its_other_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(PATIENCE_S)
    assert json.loads(got[0]) == {"a": 1}
    assert pipe.is_fifo()


TWICE = """
import os, sys
from specmoe_compile.cli.main import run
command = sys.argv[2:]
status = run(command)
sys.stdout.flush()
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 1)
sys.exit(status or run(command))
"""


def test_json_to_standard_output_comes_after_what_was_printed(untold: str, tmp_path: Path) -> None:
    """To a pipe, and redirected to a file."""
    out, store = tmp_path / "out", str(tmp_path / "store")
    command = [sys.executable, "-c", TWICE, str(out), "pack", untold]
    command += ["--store-dir", store, "--json", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text, said in ((done.stdout, "Packed "), (out.read_text(), "")):
        assert text.startswith(said) and not text.startswith("{")
        assert json.loads(text[text.index("{") :])["experts"] == 24


def test_json_to_a_device_leaves_the_device() -> None:
    check_writable(Path("/dev/null"))
    write_json(Path("/dev/null"), 1)
    assert Path("/dev/null").is_char_device()


def test_help_still_answers_after_the_numbers_are_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["replay", "--help"]) == 0
    assert "--link-gbps" in capsys.readouterr().out
