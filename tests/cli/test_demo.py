"""`specmoe demo`: the model is made once, and the whole path runs on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from specmoe_compile.cli import demo
from specmoe_compile.cli.main import run
from specmoe_compile.errors import SpecMoEError
from specmoe_compile.reference_model.widened import widened_model

SMALLEST_MIB = 3 * 128 * 64 * 4 / (1 << 20)  # an expert of the reference model in float32


def test_the_widened_model_is_made_once(tmp_path: Path) -> None:
    folder = widened_model(tmp_path, SMALLEST_MIB)
    shards = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert any(path.suffix == ".safetensors" for path in shards)
    assert widened_model(tmp_path, SMALLEST_MIB) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == shards


@pytest.mark.parametrize("record_mib", ["1", "0.1", "5"])
def test_an_impossible_size_is_one_sentence(
    record_mib: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--record-mib", record_mib, "--folder", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"specmoe: experts of {record_mib} MiB are not possible in float32: give 0.09375"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_room_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(SpecMoEError, match="MiB free"):
        widened_model(tmp_path, 3 << 20)
    assert list(tmp_path.iterdir()) == []


def test_without_accelerate_the_rest_is_compared_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(demo._compared(32, Console())) == ["accelerate", "specmoe", "eager"]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert list(demo._compared(32, Console())) == ["specmoe", "eager"]
    assert "specmoe-compile[bench]" in capsys.readouterr().out.replace("\n", " ")


def test_the_memory_limit_follows_the_packages_and_is_for_a_cpu() -> None:
    streamed = {"device": "cpu", "rss_before_bytes": 400 << 20, "fast_tier_bytes": 200 << 20}
    assert demo._default_cap(streamed) == 856 << 20
    few = {**streamed, "rss_before_bytes": 100 << 20}
    assert demo._default_cap(few) == 700 << 20
    assert demo._default_cap({**streamed, "device": "cuda"}) is None


@pytest.mark.slow
def test_the_whole_demo_gives_the_unmodified_models_tokens(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--record-mib", str(SMALLEST_MIB), "--new-tokens", "32", "--json", str(out)]
    assert run(["demo", "--folder", str(tmp_path / "demo"), *arguments]) == 0
    captured = capfd.readouterr()
    assert "class Stack:" in captured.out
    assert "32 of 32 tokens equal the unmodified model's" in captured.out
    result = json.loads(out.read_text())
    assert result["differing_tokens"] == 0
    assert [arm["name"] for arm in result["arms"]] == ["accelerate", "specmoe", "eager"]
    assert result["failed"] == {}
    streamed = result["streamed"]
    assert len(streamed["tokens"]) == 32
    assert streamed["compile_s"] > 0
    assert streamed["stats"]["store"] == "disk"
