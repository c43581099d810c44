"""The reference model: tokenizer, checkpoint, held-out text, model card and widener."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.reference_model.card import render_card
from benchmarks.reference_model.data import (
    HELD_OUT_FILES,
    cut_windows,
    default_source,
    held_out_windows,
    is_held_out,
    sample_starts,
    training_files,
)
from benchmarks.reference_model.evaluate import evaluate_model
from benchmarks.reference_model.tokenizer import EOS_ID, PAD_ID, build_tokenizer
from benchmarks.reference_model.train import balance_loss, learning_rate_factor
from benchmarks.reference_model.widen import count_different_tokens, main
from benchmarks.speculation.report import EXPECTED_RECALL, RECALL_TOLERANCE
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.reference_model.widen import widen, widen_tensor

# Of layers 1..7, with default vectors.
LEAST_RECALL = tuple(expected - RECALL_TOLERANCE for expected in EXPECTED_RECALL)
MAX_HELD_OUT_LOSS = 1.15
KIB = 1024


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def metrics():
    return json.loads((CHECKPOINT_DIR / "metrics.json").read_text())


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=200))
def test_any_text_comes_back_from_its_bytes(text):
    tokenizer = build_tokenizer(4096)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_stored_tokenizer_round_trips_without_remote_code(tokenizer):
    text = "def f(x):\n\treturn 'é€😀 \u0000 ' + x  \r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)


def test_checkpoint_is_small_and_in_the_hub_format():
    from safetensors import safe_open

    files = list(CHECKPOINT_DIR.rglob("*"))
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 20e6
    with safe_open(CHECKPOINT_DIR / "model.safetensors", framework="pt") as weights:
        shapes = {
            part: weights.get_slice(f"model.layers.7.mlp.experts.31.{part}.weight").get_shape()
            for part in ("gate_proj", "up_proj", "down_proj")
        }
    assert shapes == {"gate_proj": [64, 128], "up_proj": [64, 128], "down_proj": [128, 64]}


def test_checkpoint_generates_with_stock_transformers(model, tokenizer):
    inputs = tokenizer("import os\nimport sys\n\ndef main(", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert output.shape == (1, inputs["input_ids"].shape[1] + 16)
    assert int(output.max()) < len(tokenizer)


def test_held_out_loss_and_recall_on_a_slice(model):
    windows = held_out_windows(default_source(), 256, names=("shutil.py",))[20:32]
    # Held-out text for the default vectors too: this test must not read the training text.
    calibration = held_out_windows(default_source(), 256, names=("textwrap.py",))[:16, :-1]
    measured = evaluate_model(model, windows, calibration, batch=4, progress=False)
    assert measured["held_out_bytes"] == 12 * 256
    assert measured["held_out_nats_per_byte"] < 1.3
    recall = measured["recall_at_k"]
    assert min(recall["default_vectors"]) > 0.5
    assert sum(recall["default_vectors"]) > sum(recall["previous_token"])


def test_stored_metrics_keep_what_the_project_promises(metrics):
    assert metrics["held_out_nats_per_byte"] <= MAX_HELD_OUT_LOSS
    measured = metrics["recall_at_k"]["default_vectors"]
    assert all(m >= least for m, least in zip(measured, LEAST_RECALL, strict=True)), measured


def test_card_says_what_was_measured():
    assert (CHECKPOINT_DIR / "README.md").read_text() == render_card(CHECKPOINT_DIR)


def test_card_loss_equals_the_stored_metrics(metrics):
    card = (CHECKPOINT_DIR / "README.md").read_text()
    assert f"{metrics['held_out_nats_per_byte']:.4f} nats/byte" in card


def test_training_never_reads_held_out_files(tmp_path):
    for name in (*HELD_OUT_FILES, "ast.py", "test/test_heapq.py", "site-packages/pip.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    names = [p.relative_to(tmp_path).as_posix() for p in training_files(tmp_path)]
    assert names == ["ast.py"]
    with_tests = training_files(tmp_path, include_tests=True)
    assert [p.relative_to(tmp_path).as_posix() for p in with_tests] == ["ast.py"]


def test_real_training_list_excludes_held_out_files():
    source = default_source()
    files = training_files(source)
    assert len(files) > 100
    assert not any(is_held_out(path.relative_to(source)) for path in files)


def test_source_without_python_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no Python source"):
        training_files(tmp_path)
    with pytest.raises(ValueError, match="argparse"):
        held_out_windows(tmp_path, 16)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_each_byte_is_a_target_exactly_once(length):
    data = bytes(range(length))
    windows = cut_windows(data, 16)
    targets = windows[:, 1:].flatten()
    assert bytes(targets[targets != PAD_ID].tolist()) == data
    assert windows[0, 0] == EOS_ID
    assert torch.equal(windows[1:, 0], windows[:-1, -1])


def test_data_order_is_a_function_of_the_seed():
    draw = {"window": 8, "steps": 3, "batch": 4}
    first = sample_starts(1000, **draw, seed=1)
    assert torch.equal(first, sample_starts(1000, **draw, seed=1))
    assert not torch.equal(first, sample_starts(1000, **draw, seed=2))
    assert int(first.max()) <= 1000 - 8 - 1


def test_balance_loss_is_one_for_even_load_and_grows_with_collapse():
    even = torch.arange(8).repeat(4).view(16, 2)
    collapsed = torch.tensor([[0, 1]]).repeat(16, 1)
    flat = torch.zeros(16, 8)
    peaked = torch.zeros(16, 8)
    peaked[:, :2] = 10.0
    assert balance_loss([flat], [even]).item() == pytest.approx(1.0)
    assert balance_loss([peaked], [collapsed]).item() == pytest.approx(4.0, rel=1e-2)


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.05)


def test_widened_neurons_compute_the_same():
    gate, down = torch.randn(3, 4), torch.randn(4, 3)
    wide_gate = widen_tensor("m.experts.0.gate_proj.weight", gate, 4)
    wide_down = widen_tensor("m.experts.0.down_proj.weight", down.clone(), 4)
    assert wide_gate.shape == (12, 4) and wide_down.shape == (4, 12)
    torch.testing.assert_close(wide_down @ wide_gate, down @ gate)
    assert torch.equal(wide_down.view(4, 3, 4).sum(-1), down)  # exact: c is a power of two


@pytest.fixture(scope="module")
def widened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widened") / "model"
    assert widen(CHECKPOINT_DIR, folder, 96 * KIB, torch.bfloat16, shard_bytes=8 * 2**20) == 2
    return folder


def test_widened_checkpoint_is_a_sharded_hub_checkpoint(widened):
    config = json.loads((widened / "config.json").read_text())
    assert config["moe_intermediate_size"] == 128
    index = json.loads((widened / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert all((widened / name).stat().st_size <= 8 * 2**20 + 64 * KIB for name in shards)
    assert not list(widened.parent.glob("*.tmp"))


def test_widened_model_gives_the_same_greedy_tokens(widened):
    prompts = ("def main(argv):\n", "import os\nclass ")
    assert count_different_tokens(CHECKPOINT_DIR, widened, prompts, tokens=16) == 0


def test_widening_twice_is_refused_and_keeps_the_first(widened):
    before = sorted(widened.iterdir())
    with pytest.raises(ValueError, match="exists already"):
        widen(CHECKPOINT_DIR, widened, 96 * KIB)
    assert sorted(widened.iterdir()) == before


@pytest.mark.parametrize("record_mib", ["0.1", "5", "0", "0.0234375"])
def test_impossible_record_size_is_refused_in_one_sentence(tmp_path, capsys, record_mib):
    assert main([str(tmp_path / "out"), "--record-mib", record_mib]) == 2
    error = capsys.readouterr().err.strip()
    assert "are not possible in bfloat16: give 0.046875 times a power of two" in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_folder_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "out"), "--source", str(tmp_path / "empty")]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_failed_widening_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("specmoe_compile.reference_model.widen.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        widen(CHECKPOINT_DIR, Path(tmp_path) / "out", 96 * KIB)
    assert not list(tmp_path.iterdir())
