"""`specmoe calibrate` and `specmoe eval` on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.calibrate.calibration import Calibration
from specmoe_compile.cli.evaluate import parse_policy
from specmoe_compile.cli.fidelity_report import as_markdown, policy_rows
from specmoe_compile.cli.main import run
from specmoe_compile.cli.text import windows
from tests.cli.test_main import complaint
from tests.helpers import save_tiny

TEXT = "THE QUICK BROWN FOX JUMPS OVER 13 LAZY DOGS. " * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokens are bytes; it has 96 of them, so text is upper case."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)
    build_tokenizer(256).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _calibrate(checkpoint: Path, text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--window", "32", "--tokens", "256"]
    return ["calibrate", str(checkpoint), "--text", str(text), "--out", str(out), *sizes, *more]


def test_calibrate_writes_the_file_and_the_table(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = tmp_path / "c.safetensors", tmp_path / "c.json"
    store = ["--store", "ram"]
    assert run([*_calibrate(checkpoint, text, out), *store, "--json", str(result)]) == 0
    calibration = Calibration.load(out)
    found = json.loads(result.read_text())
    assert calibration.tokens == found["tokens"] == 6 * 32
    assert calibration.measured_tokens == found["measured_tokens"] == 2 * 32
    assert found["fingerprint"] == calibration.fingerprint
    assert [layer["recall"] for layer in found["layers"]] == [
        layer.recall for layer in calibration.layers
    ]
    printed = capsys.readouterr().out
    assert f"{100 * found['layers'][1]['recall']:.1f} %" in printed


def test_calibrate_refuses_short_text(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A" * 40)
    said = complaint(capsys, *_calibrate(checkpoint, short, tmp_path / "c"))
    assert "two windows of 32" in said
    short.write_text("A" * 20)
    said = complaint(capsys, *_calibrate(checkpoint, short, tmp_path / "c"))
    assert "fewer than one window of 32" in said


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\xff\xfe\xff", "is not UTF-8 text")]
)
def test_calibrate_refuses_a_bad_text_file(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert message in complaint(capsys, *_calibrate(checkpoint, path, tmp_path / "c"))


def test_calibrate_refuses_a_missing_folder(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, *_calibrate(checkpoint, text, tmp_path / "none" / "c"))
    assert "The folder of --out" in said


def _evaluate(checkpoint: Path, text: Path, store: Path, more: Sequence[str]) -> list[str]:
    sizes = "--tokens 8 --window 26 --context 20 --prompts 2 --prompt-tokens 20 --new-tokens 4"
    command = ["eval", str(checkpoint), "--text", str(text), "--store-dir", str(store)]
    return [*command, *sizes.split(), "-O", "lowering=eager", "--expert-cache", "40%", *more]


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_eval_reports_every_policy_with_every_skip_list(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"fidelity.{name}" for name in ("json", "svg", "md")}
    files = ["--json", str(paths["json"]), "--plot", str(paths["svg"])]
    policies = ["--policy", "exact", "--policy", "commit", "--skip", "none", "--skip", "0,1"]
    command = [*policies, *files, "--markdown", str(paths["md"])]
    assert run(_evaluate(checkpoint, text, tmp_path / "store", command)) == 0
    found = json.loads(paths["json"].read_text())
    names = [policy["name"] for policy in found["policies"]]
    assert names == [
        "exact",
        "commit, predicted weights",
        "commit, predicted weights, skip 0,1",
    ]
    exact, _, skipped = found["policies"]
    assert exact["greedy_agreement"] == skipped["greedy_agreement"] == 1.0
    assert exact["tokens"] == 2 * 5 and exact["greedy_tokens"] == 2 * 4
    assert found["reference"] == "unmodified model"
    assert [layer["recall"] is None for layer in found["layers"]] == [True, False]
    assert paths["svg"].read_text().lstrip().startswith("<?xml")
    document = paths["md"].read_text()
    assert "commit, predicted weights, skip 0,1" in document and "fidelity.svg" in document
    assert "exact" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["exact=1", "commit=maybe", "default_vector", "best"])
def test_eval_refuses_unknown_policies(policy: str) -> None:
    with pytest.raises(ValueError, match=r"--policy .* is not valid"):
        parse_policy(policy)


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "x"])
def test_eval_refuses_wrong_thresholds(value: str) -> None:
    with pytest.raises(ValueError, match="is not valid"):
        parse_policy(f"default_vector={value}")


@pytest.mark.parametrize("skip", ["0,9", "first"])
def test_eval_refuses_wrong_layers(checkpoint: Path, text: Path, tmp_path: Path, skip: str) -> None:
    command = ["--policy", "commit", "--skip", skip]
    assert run(_evaluate(checkpoint, text, tmp_path / "store", command)) == 2


def test_eval_refuses_a_context_as_long_as_the_window(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _evaluate(checkpoint, text, tmp_path, ["--context", "25"])
    assert "leaves nothing of a --window of 26" in complaint(capsys, *command)


def test_windows_are_spread_and_do_not_overlap(tmp_path: Path) -> None:
    ids = list(range(100))
    found = windows(ids, count=4, length=20, path=tmp_path)
    assert found.shape == (4, 20)
    assert found[0, 0] == 0 and found[-1, -1] == 99
    flat = found.reshape(-1).tolist()
    assert len(set(flat)) == len(flat)
    assert windows(ids, count=99, length=20, path=tmp_path).shape == (5, 20)
    assert windows(ids, count=1, length=20, path=tmp_path).tolist() == [list(range(20))]


def _policy(**changes: Any) -> dict[str, Any]:
    found = {
        "name": "exact",
        "policy": "exact",
        "tokens": 10,
        "loss_nats": 1.0,
        "loss_increase_nats": 0.0,
        "kl_nats": -1e-9,
        "top1_agreement": 1.0,
        "greedy_agreement": 1.0,
        "greedy_same_prompts": 2,
        "greedy_prompts": 2,
        "bytes_per_token": 2048.0,
        "hit_rate": 0.5,
    }
    return found | changes


def test_bytes_are_told_against_the_exact_policy() -> None:
    exact, other = policy_rows([_policy(), _policy(policy="commit", bytes_per_token=512.0)])
    assert exact[7:9] == ("2.0 KiB", "100.0 %") and other[7:9] == ("512 B", "25.0 %")
    assert exact[3] == "0.0000"
    assert policy_rows([_policy(policy="commit")])[0][8] == "-"


def test_time_per_token_is_told_where_it_was_measured() -> None:
    assert [row[-1] for row in policy_rows([_policy(), _policy(ms_per_token=3.14159)])] == [
        "-",
        "3.14",
    ]


def test_document_has_layers_without_prediction() -> None:
    layer = {"recall": None, "cosine": None, "residual_recall": None, "residual_cosine": None}
    result = {
        "model": "tiny",
        "dtype": "float32",
        "expert_cache": "25%",
        "reference": "unmodified model",
        "policies": [_policy()],
        "layers": [layer],
        "sizes": {"prompts": [2, 20], "new_tokens": 4},
    }
    assert "| 0 | - | - | - | - |" in as_markdown(result, None)
