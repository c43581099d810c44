"""`specmoe generate`, `bench` and `eval` under torchrun: one voice, the output of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specmoe_compile.reference_model import CHECKPOINT_DIR
from tests.ranks.groups import ROOT, finished, needs_expert_parallel, torchrun

pytestmark = [pytest.mark.slow, needs_expert_parallel]

MAIN = ("-m", "specmoe_compile.cli.main")
MODEL = str(CHECKPOINT_DIR)


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    return finished([sys.executable, *MAIN, *arguments])


def in_two(*arguments: str) -> subprocess.CompletedProcess[str]:
    ended = torchrun(2, *MAIN, *arguments)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_generate_prints_the_text_once(tmp_path: Path) -> None:
    common = ["generate", MODEL, "--dtype", "float32", "--store", "disk", "--prompt", "def f(a):"]
    common += ["--store-dir", str(tmp_path / "store"), "--max-new-tokens", "12"]
    common += ["--device", "cpu", "--temperature", "0.8", "--json"]
    one = alone(*common, str(tmp_path / "one.json"))
    two = in_two(*common, str(tmp_path / "two.json"))
    assert one.returncode == 0, one.stderr[-2000:]
    assert two.stdout == one.stdout
    assert two.stderr.count("first token after") == 1
    found = read(tmp_path / "two.json")
    assert found["tokens"] == read(tmp_path / "one.json")["tokens"]
    assert found["stats"]["steps"] == 2 * read(tmp_path / "one.json")["stats"]["steps"]


def test_bench_compares_its_own_arms_and_prints_one_table(tmp_path: Path) -> None:
    two = in_two(
        "bench", MODEL, "--dtype", "float32", "--device", "cpu", "--new-tokens", "10",
        "--arms", "cache,specmoe", "--repeats", "1", "--store-dir", str(tmp_path / "store"),
        "--json", str(tmp_path / "two.json"),
    )  # fmt: skip
    found = read(tmp_path / "two.json")
    assert [arm["name"] for arm in found["arms"]] == ["cache", "specmoe"] and not found["failed"]
    assert found["settings"]["ranks"] == 2
    assert len({arm["tokens_sha256"] for arm in found["arms"]}) == 1
    assert two.stdout.count("first token") == 1


def test_eval_is_exact_and_prints_once(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "tests" / "helpers.py").read_text() * 2)
    in_two(
        "eval", MODEL, "--text", str(text), "--dtype", "float32", "--policy", "exact",
        "--tokens", "20", "--window", "32", "--context", "8", "--prompts", "2",
        "--prompt-tokens", "8", "--new-tokens", "6", "--store-dir", str(tmp_path / "store"),
        "--json", str(tmp_path / "two.json"),
    )  # fmt: skip
    (exact,) = read(tmp_path / "two.json")["policies"]
    assert exact["greedy_agreement"] == 1.0 and exact["top1_agreement"] == 1.0
    assert abs(exact["loss_increase_nats"]) < 1e-4
    assert exact["bytes_per_token"] > 0
