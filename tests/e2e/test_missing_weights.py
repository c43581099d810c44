"""Weights that a checkpoint lacks are named, and nothing else is taken for lacking."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import specmoe_compile
from specmoe_compile.errors import CheckpointError
from specmoe_compile.hf import model_loader
from tests.helpers import save_tiny, tiny_qwen3_moe
from tests.models.families import Family, families
from tests.models.families import build as build_family
from tests.runtime import tiny_checkpoints

IDS = torch.tensor([[5, 17, 80, 3]])


def load(folder: Path, tmp_path: Path, **kwargs: Any) -> Any:
    options = {"device": "cpu", "store": "disk", "store_dir": tmp_path / "store", **kwargs}
    return specmoe_compile.from_pretrained(folder, progress=False, **options)


def drop(folder: Path, part: str) -> None:
    """Take the tensors whose names have `part` out of a checkpoint."""
    path = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if part not in name}
    save_file(kept, path, {"format": "pt"})


def test_the_attention_of_a_layer_is_named_before_anything_is_packed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    drop(folder, ".layers.1.self_attn.")
    with pytest.raises(CheckpointError) as caught:
        load(folder, tmp_path)
    text = str(caught.value)
    assert "lacks weights of Qwen3MoeForCausalLM, which would be random: " in text
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        assert f"model.layers.1.self_attn.{name}.weight" in text
    assert "missing_weights='random'" in text and "\n" not in text
    assert not (tmp_path / "store").exists()


def test_random_weights_are_the_callers_choice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "model")
    drop(folder, ".layers.1.self_attn.q_proj")
    with caplog.at_level(logging.WARNING, "specmoe_compile"):
        model = load(folder, tmp_path, missing_weights="random")
    assert "lacks model.layers.1.self_attn.q_proj.weight: they are drawn at random" in caplog.text
    assert float(model.model.layers[1].self_attn.q_proj.weight.std()) > 0.01
    kept = model.model.layers[1].self_attn.k_proj.weight
    assert torch.equal(kept, tiny_qwen3_moe().model.layers[1].self_attn.k_proj.weight)
    with pytest.raises(ValueError, match="missing_weights='zeros' is not valid"):
        load(folder, tmp_path, missing_weights="zeros")


def test_a_reward_model_says_what_it_was_saved_as(tmp_path: Path) -> None:
    config = tiny_qwen3_moe().config
    config.num_labels = 3
    transformers.Qwen3MoeForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model", tmp_path)
    text = str(caught.value)
    assert "lacks weights of Qwen3MoeForCausalLM, which would be random: lm_head.weight" in text
    assert "It was saved as Qwen3MoeForSequenceClassification." in text
    assert "does not know: 1, such as score.weight." in text


def test_a_layer_in_an_unknown_format_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    weight = tensors.pop("model.layers.0.self_attn.o_proj.weight")
    tensors["model.layers.0.self_attn.o_proj.weight_nf3"] = weight.to(torch.int32)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"o_proj\.weight\. .* not know: 1, such as .*\.weight_nf3\."
    ):
        load(folder, tmp_path)


def test_what_only_loading_shows_is_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    drop(folder, "model.norm.weight")
    monkeypatch.setattr(model_loader, "missing_before_loading", lambda model, made: [])
    with pytest.raises(CheckpointError, match=r"lacks weights .* model\.norm\.weight"):
        load(folder, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_missing_unless_both_are(tied: bool, tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **{**tiny_qwen3_moe().config.to_dict(), "tie_word_embeddings": tied}
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model", tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, model.eval()(IDS).logits, atol=1e-5)
    drop(tmp_path / "model", "embed_tokens" if tied else "lm_head")
    with pytest.raises(CheckpointError, match="embed_tokens" if tied else "lm_head"):
        load(tmp_path / "model", tmp_path)


def test_a_quantisation_of_the_text_model_counts_as_the_models(tmp_path: Path) -> None:
    folder = tiny_checkpoints.write("qwen3_vl_moe", tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    settings = {"quant_method": "exl3", "bits": 4}
    config["text_config"]["quantization_config"] = settings
    path.write_text(json.dumps(config))
    with pytest.raises(specmoe_compile.SpecMoEError, match="exl3"):
        load(folder, tmp_path)


QUICK = ("afmoe", "deepseek_v3", "gpt_oss", "jamba", "mixtral", "phimoe", "qwen2_moe")


def check_family(family: Family, tmp_path: Path) -> None:
    """A saved model lacks nothing, in our eyes and in those of transformers."""
    build_family(family).save_pretrained(tmp_path / family.name)
    specmoe_compile.close(
        load(tmp_path / family.name, tmp_path, store="ram", store_dir=None, expert_cache=None)
    )


@pytest.mark.parametrize("name", QUICK)
def test_a_saved_model_lacks_nothing(name: str, tmp_path: Path) -> None:
    check_family(families()[name], tmp_path)


@pytest.mark.slow
def test_no_family_lacks_anything(tmp_path: Path) -> None:
    wrong: dict[str, str] = {}
    for family in families().values():
        if family.model_class is None:
            continue
        try:
            check_family(family, tmp_path)
        except Exception as error:
            wrong[family.name] = f"{type(error).__name__}: {error}"
    assert wrong == {}
