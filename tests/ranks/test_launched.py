"""Which rank this process is, which GPU that gives it, and what the command line makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from specmoe_compile.cli.main import run
from specmoe_compile.hf.ranks import _described, device_of_rank
from specmoe_compile.system.launched import Launched, launched


def launch(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch)
    assert launched() == Launched(0, 1, 0, 1)
    launch(monkeypatch, WORLD_SIZE="1")
    assert launched().size == 1


def test_torchrun_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    assert launched() == Launched(5, 8, 1, 4)


@pytest.mark.parametrize(
    "values",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_an_environment_that_makes_no_sense_is_one_sentence(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, **values)
    with pytest.raises(ValueError, match=r"The environment says .*WORLD_SIZE=.*torchrun"):
        launched()


def test_a_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    here = Launched(3, 4, 1, 2)
    assert device_of_rank(torch.device("cuda"), here) == torch.device("cuda", 1)
    assert device_of_rank(torch.device("cuda", 1), here) == torch.device("cuda", 1)
    assert device_of_rank(torch.device("cpu"), here) == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda:0' is not the GPU of local rank 1"):
        device_of_rank(torch.device("cuda", 0), here)
    with pytest.raises(ValueError, match="Local rank 2 has no GPU of its own: PyTorch sees 2"):
        device_of_rank(torch.device("cuda"), Launched(2, 3, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "x"], "specmoe pack runs in one process, but 2 were started"),
        (["generate", "x", "--prompt", "-"], "--prompt - is for one process, but 2 were started"),
        (
            ["generate", "x", "--prompt", "a", "--trace", "t"],
            "--trace is for one process, but 2 were started",
        ),
        (
            ["bench", "x", "--arms", "accelerate,cache"],
            "--arms accelerate is for one process, but 2 were started",
        ),
        (["bench", "x", "--memory-cap", "1GiB"], "--memory-cap is for one process"),
        (["eval", "x", "--text", "t", "--skip", "auto"], "--skip auto is for one process"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_one_process_does_is_refused_in_several(
    arguments: list[str],
    message: str,
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch(monkeypatch, RANK=rank, WORLD_SIZE="2")
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert said.startswith("specmoe: " if rank == "0" else "specmoe (rank 1): ")


def test_only_the_first_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, speaks in (("0", True), ("1", False)):
        launch(monkeypatch, RANK=rank, WORLD_SIZE="2")
        assert run(["--version"]) == 0
        assert bool(capsys.readouterr().out) is speaks
    assert sys.stdout is not None


def test_arguments_that_differ_have_other_words(tmp_path: Path) -> None:
    one = {"input_ids": torch.tensor([[1, 2]]), "n": 3, "streamer": object()}
    same = {"input_ids": torch.tensor([[1, 2]]), "n": 3, "streamer": None}
    assert _described(one) == _described(same)
    assert _described(one) != _described({**same, "input_ids": torch.tensor([[1, 3]])})
    assert _described(one) != _described({**same, "n": 4})
    assert _described({"x": {"y": torch.ones(2, dtype=torch.bfloat16)}}).keys() == {"x.y"}
