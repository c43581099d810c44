"""The commands on a real GPU, over a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.calibrate.calibration import Calibration
from specmoe_compile.cli.main import run
from tests.helpers import greedy, save_tiny

pytestmark = pytest.mark.gpu

PROMPT = "THE QUICK BROWN FOX"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokens are bytes."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    build_tokenizer(256).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_generate_gives_the_unmodified_models_tokens(
    store: str, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    where = ["--device", "cuda", "--store", store, "--store-dir", str(tmp_path / "store")]
    sizes = ["--expert-cache", "50%", "--max-new-tokens", "16", "--json", str(out)]
    assert run(["generate", str(checkpoint), "--prompt", PROMPT, *where, *sizes]) == 0
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint).cuda()
    ids = torch.tensor([list(PROMPT.encode())], device="cuda")
    expected = greedy(plain, ids, 16, cache_implementation="static")
    assert json.loads(out.read_text())["tokens"] == expected[0, ids.shape[1] :].tolist()


def test_bench_compares_tokens(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arms = ["--arms", "eager,on_demand,cache,specmoe", "--device", "cuda", "--expert-cache", "50%"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)
    sizes = ["--new-tokens", "12", "--repeats", "1", "--prompt-file", str(prompts)]
    sizes += ["--dtype", "float32", "--json", str(out)]
    assert run(["bench", str(checkpoint), *arms, *sizes]) == 0
    found = json.loads(out.read_text())["arms"]
    assert len({arm["tokens_sha256"] for arm in found}) == 1
    notes = {arm["name"]: str(arm["notes"]) for arm in found}
    assert all("reduce-overhead" in notes[name] for name in ("on_demand", "cache", "specmoe"))


def test_calibration_is_that_of_the_cpu(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("PACK MY BOX WITH FIVE DOZEN LIQUOR JUGS. " * 12)
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        sizes = ["--window", "32", "--tokens", "256", "--store", "ram", "--train-estimator"]
        arguments = ["--text", str(text), "--out", str(out), "--device", device, *sizes]
        assert run(["calibrate", str(checkpoint), *arguments]) == 0
        found.append(Calibration.load(out))
    here, there = found
    torch.testing.assert_close(there.default_vectors, here.default_vectors, rtol=1e-3, atol=1e-4)
    assert [layer.recall for layer in there.layers] == pytest.approx(
        [layer.recall for layer in here.layers], abs=0.02
    )
