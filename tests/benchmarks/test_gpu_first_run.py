"""The first run on a GPU goes through on the CPU, dry, and says what that is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.hardware import host_reads as gpu_host_reads
from benchmarks.hardware.first_run import GATHERED, GRIDS, RECORDS, TOKENS, Rig, main
from benchmarks.kernels import down_projection as gpu_down_kernel
from benchmarks.kernels.compile_spec import MODEL_SHAPES


def test_every_phase_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dry.json"
    phases = ["link", "gather", "experts", "decode", "sanitizer"]
    assert main(["--dry", "--out", str(out), "--only", *phases]) == 0
    assert "not a GPU's" in capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["dry"] is True and result["device"] == "CPU"
    sizes = len(Rig(dry=True).record_mb)
    assert len(result["link"]) == sizes * len(RECORDS)
    assert len(result["gather"]) == sizes * len(GATHERED)
    assert all(f"gather_{grid}_busy_gbps" in result["gather"][0] for grid in GRIDS)
    assert len(result["experts"]) == len(MODEL_SHAPES) * len(TOKENS)
    assert set(result["decode"]) == set(result["sanitizer"]) == {"not run"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_names_the_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "--dry" in capsys.readouterr().err
    assert gpu_host_reads.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert gpu_down_kernel.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "--dry" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_the_down_projection_is_timed_by_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "down.json"
    assert gpu_down_kernel.main(["--dry", "--out", str(out)]) == 0
    assert "not a GPU's" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))["launch_us"]
    for shape in MODEL_SHAPES:
        assert set(map(int, found[shape.name])) == {0, 1, shape.top_k // 2, shape.top_k}
    slots = gpu_down_kernel.slots_of(2, 4, 9)
    assert sorted(slots[0].tolist())[:2] == [-1, -1] and len(set(slots[0].tolist())) == 3
