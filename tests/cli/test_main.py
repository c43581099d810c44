"""The command line: help that teaches, and one sentence with status 2 for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import typer

from specmoe_compile import __version__
from specmoe_compile.cli.bench import bench
from specmoe_compile.cli.main import app, run
from specmoe_compile.cli.pack import pack
from specmoe_compile.cli.replay import replay
from specmoe_compile.cli.serve import serve
from specmoe_compile.hf.missing_weights import MissingWeights
from specmoe_compile.hf.offload_options import StoreKind
from specmoe_compile.replay.formats import FORMATS
from specmoe_compile.runtime.experts.formats.quantise import QUANTISED_FORMATS
from tests.helpers import save_tiny

COMMANDS = ("demo", "generate", "bench", "pack", "replay", "doctor")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixture-of-Experts checkpoint without a tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command line that must be refused and return its one sentence."""
    capsys.readouterr()
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("specmoe: ")
    assert lines[0].endswith((".", "?", "!"))
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_examples_and_debug(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text
    assert f"specmoe {command}" in text
    assert "--debug" in text
    assert "--json" in text


def test_no_option_is_described_by_its_own_name() -> None:
    """Typer 0.27.2 would call it by that: `--DEVICE` instead of `--device`."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for option in command.params:
            if option.opts[0].startswith("-"):
                assert option.metavar != option.name.upper(), (name, option.name)


def test_choices_are_those_of_the_package() -> None:
    """The command line names them itself, since the package takes a second to import."""
    for command, name, choices in (
        (pack, "quantize", QUANTISED_FORMATS),
        (serve, "store", get_args(StoreKind)),
        (bench, "missing_weights", get_args(MissingWeights)),
        (replay, "number_format", FORMATS),
    ):
        hint = get_type_hints(command)[name]
        literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        assert sorted(get_args(literals[0])) == sorted(choices), (command, name)


def test_without_a_command_the_list_of_commands_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"specmoe {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("fly",), "No such command"),
        (("generate",), "MODEL"),
        (("generate", "x", "--frob"), "--frob"),
        (("generate", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("generate", "x"), "--prompt"),
        (("generate", "x", "--prompt", ""), "empty"),
        (("generate", "x", "--prompt", "a", "--dtype", "int8"), "float32"),
        (("generate", "x", "--prompt", "a", "--store", "tape"), "'auto', 'ram', 'disk'"),
        (("generate", "x", "--prompt", "a", "--kv-cache", "huge"), "'static', 'dynamic'"),
        (("generate", "x", "--prompt", "a", "-O", "polcy=exact"), "did you mean 'policy'"),
        (("generate", "x", "--prompt", "a", "-O", "prefetch"), "NAME=VALUE"),
        (("generate", "x", "--prompt", "a", "-O", "lookahead=0"), "lookahead"),
        (("generate", "x", "--prompt", "a", "--json", "/nowhere/out.json"), "/nowhere"),
        (("bench", "x", "--arms", "cache,warp"), "'warp'"),
        (("bench", "x", "--arms", "cache,cache"), "twice"),
        (("bench", "x", "--arms", ","), "no arm"),
        (("bench", "x", "--expert-cache", "much"), "--expert-cache"),
        (("bench", "x", "--memory-cap", "-3"), "--memory-cap"),
        (("bench", "x", "--new-tokens", "5"), "--skip-tokens"),
        (("bench", "x", "--json", "/"), "folder"),
        (("doctor", "--store-dir", "/nowhere"), "/nowhere"),
        (("demo", "--expert-cache", "1 parsec"), "--expert-cache"),
    ],
)
def test_bad_options_are_one_sentence(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, *arguments)
    assert expected in said
    assert "error" not in said.lower(), "no kind of error of Python's or of a package's"


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("bench",), ("pack",)])
def test_bad_models_are_one_sentence(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in complaint(capsys, name, str(empty), *options)
    (empty / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert "no weights" in complaint(capsys, name, str(empty), *options)
    missing = str(tmp_path / "missing")
    assert missing in complaint(capsys, name, missing, *options)


@pytest.mark.parametrize("command", ["bench", "pack"])
def test_a_dense_model_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    capsys.readouterr()
    assert "xperts" in complaint(capsys, command, str(tmp_path / "dense"))


def test_debug_shows_the_traceback_before_the_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["pack", str(tmp_path), "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("specmoe: ")


def test_pack_writes_a_store_and_its_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = tmp_path / "store", tmp_path / "out.json"
    assert run(["pack", str(checkpoint), "--store-dir", str(store), "--json", str(out)]) == 0
    assert "Packed 24 experts of 3 layers" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert (result["schema"], result["experts"], result["reused"]) == (1, 24, False)
    assert result["peak_rss_bytes"] > 0
    assert (store / "header.json").is_file()
    assert run(["pack", str(checkpoint), "--store-dir", str(store), "--verify"]) == 0
    assert "already holds" in capsys.readouterr().out
