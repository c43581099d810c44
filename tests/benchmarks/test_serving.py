"""The server's benchmark: each phase on a tiny model, and the published page is of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kit.places import DOCUMENTS, RESULTS
from benchmarks.reference_model.tokenizer import build_tokenizer
from benchmarks.serving import run
from benchmarks.serving.cost import over
from benchmarks.serving.report import page
from tests.helpers import save_tiny


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert over([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["median"] == 2.0
    assert over([1.0, 1.0], [1.0, 1.0]) == {"median": 1.0, "error": 0.0}


@pytest.mark.slow
def test_each_phase_is_measured_and_keeps_the_others(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    folder = save_tiny(tmp_path / "model", vocab_size=256)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    build_tokenizer(256).save_pretrained(folder)
    out = tmp_path / "serving.json"
    call = [str(folder), "--out", str(out), "--store-dir", str(tmp_path / "store")]
    call += ["--tokens", "4", "--seconds", "0", "--rounds", "1", "--history", "64"]
    assert run.main([*call, "--phase", "second_turn"]) == 0
    assert run.main([*call, "--phase", "cost", "load"]) == 0
    found = json.loads(out.read_text())
    assert found.keys() == {"schema", *run.PHASES}
    assert set(found["cost"]["over_alone"]) == {"served", "alone_again"}
    assert [row["clients"] for row in found["load"]["rows"]] == [0, 1, 4, 8]
    assert all(row["tokens_per_s"] > 0 for row in found["load"]["rows"])
    tokens = found["second_turn"]["tokens"]
    assert 48 <= tokens["history"] <= 80 and tokens["prompt"] > tokens["history"]
    cached = found["second_turn"]["cached"]
    assert cached["kept"] >= tokens["history"] and cached["not_kept"] == 0
    assert page(found).count("\n|") == 12


def test_the_page_is_of_the_data() -> None:
    data = json.loads((RESULTS / "serving.json").read_text(encoding="utf-8"))
    assert page(data) == (DOCUMENTS / "serving.md").read_text(encoding="utf-8")
