"""The benchmark of a token through `generate`, dry: a tiny model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.full_size import token as gpu_token

TRACE = ["--trace", "unused", "--dry"]


def test_attention_alone_is_compared_with_its_reference(tmp_path: Path) -> None:
    out = tmp_path / "token.json"
    assert gpu_token.main(["--out", str(out), "--phases", "attention", *TRACE]) == 0
    (row,) = json.loads(out.read_text())["rows"].values()
    # Outputs are rounded to bfloat16's 8 bits.
    assert 0.0 < row["relative_error"] < 1e-2 and row["filled_bytes"] == 2 * 2 * 20 * 16 * 2


def test_an_arm_without_a_cache_finds_nothing_of_the_last_token(tmp_path: Path) -> None:
    out, uniform = tmp_path / "token.json", ["--routing", "uniform", "--layers", "2"]
    assert gpu_token.main(["--out", str(out), *TRACE, *uniform, "--arms", "on_demand"]) == 0
    ((key, row),) = json.loads(out.read_text())["rows"].items()
    assert key == "tiny-qwen3|32|on_demand|attention on|uniform" and row["routing"] == "uniform"
    assert row["hit_rate"] == 0.0 and row["missed_bytes_per_token"] > 0


def test_an_arm_with_a_limit_fetches_no_more_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    compile_model = torch.compile

    def compiling(model: Any, **given: Any) -> Any:
        options = given.pop("options")
        asked.append(options.get("prefetch_budget_bytes"))
        return compile_model(model, **given, options={**options, "lowering": "eager"})

    monkeypatch.setattr(torch, "compile", compiling)
    out, uniform = tmp_path / "token.json", ["--routing", "uniform", "--layers", "2"]
    arms = ["--arms", "prefetch_no_cache", "prefetch_no_cache_most_1", "prefetch_no_cache_most_4"]
    assert gpu_token.main(["--out", str(out), *TRACE, *uniform, *arms]) == 0
    none, one, four = asked
    assert none is None and one > 0 and four == 4 * one


@pytest.mark.slow
def test_a_cell_is_measured_through_generate_and_kept(tmp_path: Path) -> None:
    out, trace = tmp_path / "token.json", tmp_path / "trace.safetensors"
    call = ["--out", str(out), "--dry", "--trace", str(trace), "--arms", "resident"]
    assert gpu_token.main(call) == 0
    (key, row), *others = json.loads(out.read_text())["rows"].items()
    assert key == "tiny-qwen3|32|resident|attention on" and not others
    assert row["generation"] == {"tokens": 7, "ahead": 0, "dropped": 0, "reason": None}
    assert row["hit_rate"] == 1.0 and len(row["tokens"]) == 7 and row["wall_ms"]["p50"] > 0
    written = out.read_bytes()
    assert gpu_token.main(call) == 0 and out.read_bytes() == written, "nothing is measured twice"
    prompts = ["--phases", "first_token", "--prompts", "20", "--turns", str(tmp_path / "turns")]
    assert gpu_token.main([*call, *prompts]) == 0
    first = json.loads(out.read_text())["rows"]["first_token|tiny-qwen3|20"]
    assert first["start_s"] == sorted(first["start_s"]) and len(first["start_s"]) == 3
    assert 0 < first["first_token_s"] < first["start_s"][-1]
