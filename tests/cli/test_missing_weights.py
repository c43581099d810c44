"""`--missing-weights`: every command that loads a model takes it, and hands it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.main import get_command

import specmoe_compile
from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.bench import measure as bench_measure
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.cli.main import app, run
from specmoe_compile.errors import SpecMoEError
from tests.helpers import save_tiny

LACKING = "model.layers.1.self_attn.q_proj.weight"
COMMANDS: dict[str, list[str]] = {
    "generate": ["--prompt", "hello"],
    "calibrate": ["--text", "{text}", "--out", "{out}", "--window", "32", "--tokens", "128"],
    "eval": ["--text", "{text}", "--context", "4", "--window", "32", "--tokens", "64"],
    "serve": ["--port", "0"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without one matrix of an attention."""
    folder = save_tiny(tmp_path_factory.mktemp("lacking") / "model", vocab_size=256)
    build_tokenizer(256).save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[LACKING]
    save_file(tensors, file, {"format": "pt"})
    return folder


def arguments(command: str, checkpoint: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("PACK MY BOX WITH FIVE DOZEN LIQUOR JUGS. " * 12)
    given = [a.format(text=text, out=tmp_path / "out.st") for a in COMMANDS[command]]
    return [command, str(checkpoint), "--store-dir", str(tmp_path / "store"), *given]


def test_every_command_that_loads_has_the_option() -> None:
    commands: Any = get_command(app)
    loads = {
        name
        for name, command in commands.commands.items()
        if {"model", "expert_cache"} <= {parameter.name for parameter in command.params}
    }
    assert loads == {*COMMANDS, "bench"}
    for name in loads:
        names = {parameter.name for parameter in commands.commands[name].params}
        assert "missing_weights" in names, name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_default_names_what_is_missing(
    command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(command, checkpoint, tmp_path)) == 2
    assert LACKING in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_random_is_handed_on(
    command: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["missing_weights"])
        raise SpecMoEError("enough")

    monkeypatch.setattr(specmoe_compile, "from_pretrained", load)
    start = arguments(command, checkpoint, tmp_path)
    assert run([*start, "--missing-weights", "random"]) == 2
    assert run([*start, "--missing-weights", "zeros"]) == 2
    assert given == ["random"]


def test_bench_hands_it_to_its_arms(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measure(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[3])
        raise SpecMoEError("enough")

    monkeypatch.setattr(bench_measure, "measure", measure)
    start = ["bench", str(checkpoint), "--arms", "cache", "--device", "cpu"]
    assert run([*start, "--missing-weights", "random"]) == 2
    settings = asked[0]
    job = ArmJob(
        arm="cache",
        model=str(checkpoint),
        prompts=[[1]],
        store_dir=str(tmp_path / "store"),
        work_dir=str(tmp_path),
        **settings,
    )
    given: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["missing_weights"])
        raise SpecMoEError("enough")

    monkeypatch.setattr(specmoe_compile, "from_pretrained", load)
    with pytest.raises(SpecMoEError, match="enough"):
        ARMS["cache"].load(job, ARMS["cache"])
    assert given == ["random"]


def test_eval_has_no_plain_model_with_the_same_random_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = arguments("eval", checkpoint, tmp_path)
    assert run([*start, "--missing-weights", "random", "--reference", "plain"]) == 2
    assert "--reference offloaded" in capsys.readouterr().err
