"""Adapters (PEFT) of a model whose experts are offloaded: loaded, saved, or refused in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import specmoe_compile
from specmoe_compile.cli.main import run
from specmoe_compile.errors import (
    CheckpointError,
    SpecMoEError,
    StoreError,
    UnsupportedModelError,
)
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.packing import pack
from specmoe_compile.runtime.store.writer import StoreReport
from tests.helpers import greedy, prompts, save_tiny
from tests.runtime import tiny_checkpoints
from tests.runtime.test_packing import assert_holds_model, assert_rest_equal, load_reference

peft = pytest.importorskip("peft")

IDS = prompts(2, 7)
PACKED = ["q_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def attention_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "attention"
    save_adapter(base, folder, target_modules=["q_proj", "v_proj"])
    return folder


def save_adapter(base: Path, folder: Path, **config: Any) -> None:
    """Save an adapter whose weights are random numbers, as training would leave them."""
    lora = peft.LoraConfig(r=4, init_lora_weights=False, **config)
    adapted = peft.get_peft_model(load_reference(base), lora)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(folder)


def plain(base: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, **kwargs).eval()


def load(base: Path, store_dir: Path, **kwargs: Any) -> Any:
    options = {"device": "cpu", "store": "disk", "store_dir": store_dir, **kwargs}
    return specmoe_compile.from_pretrained(base, progress=False, **options)


def tokens(model: Any) -> torch.Tensor:
    out: torch.Tensor = greedy(model, IDS, 8) if not is_peft(model) else generate_peft(model)
    return out


def is_peft(model: Any) -> bool:
    return isinstance(model, peft.PeftModel)


def generate_peft(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    return out


def test_an_adapter_of_the_attention_is_loaded_used_saved_and_merged(
    base: Path, attention_adapter: Path, tmp_path: Path
) -> None:
    expected = tokens(peft.PeftModel.from_pretrained(plain(base), attention_adapter).eval())
    without = tokens(plain(base))
    assert not torch.equal(expected, without), "the adapter does something"
    adapted = peft.PeftModel.from_pretrained(load(base, tmp_path / "store"), attention_adapter)
    assert torch.equal(tokens(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(tokens(adapted), without)
    adapted.save_pretrained(tmp_path / "again")
    first = load_file(attention_adapter / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == second.keys() and len(first) == 12
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(tokens(adapted.merge_and_unload()), expected)
    by_transformers = load(base, tmp_path / "store")
    by_transformers.load_adapter(str(attention_adapter))
    assert torch.equal(tokens(by_transformers), expected)


def test_a_model_with_an_adapter_of_the_attention_is_offloaded(
    base: Path, attention_adapter: Path, tmp_path: Path
) -> None:
    adapted = peft.PeftModel.from_pretrained(plain(base), attention_adapter).eval()
    expected = tokens(adapted)
    offloaded: Any = specmoe_compile.offload(
        adapted, device="cpu", store="disk", store_dir=tmp_path / "store", progress=False
    )
    assert offloaded is adapted
    assert adapted.get_base_model().model.layers[0].mlp.experts.down_proj.numel() == 0
    assert torch.equal(tokens(offloaded), expected)


@pytest.mark.parametrize("targets", [PACKED, "all-linear"])
def test_an_adapter_of_the_experts_is_refused_on_an_offloaded_model(
    targets: Any, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecMoEError, match=r"from_pretrained\(base, adapter=PATH\)"):
        peft.get_peft_model(
            load(base, tmp_path / "store"), peft.LoraConfig(r=4, target_modules=targets)
        )


def test_a_model_whose_experts_are_adapted_is_refused_before_anything_is_touched(
    base: Path, tmp_path: Path
) -> None:
    lora = peft.LoraConfig(r=4, target_modules=PACKED, init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(plain(base), lora).eval()
    expected = tokens(adapted)
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(UnsupportedModelError, match=r"Merge it first \(model\.merge_and_unl"):
            specmoe_compile.offload(model, device="cpu", store_dir=tmp_path / "store")
    assert torch.equal(tokens(adapted), expected)
    merged = adapted.merge_and_unload()
    expected = tokens(merged)
    offloaded = specmoe_compile.offload(merged, device="cpu", store="disk", progress=False)
    assert torch.equal(tokens(offloaded), expected)


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    return peft.PeftModel.from_pretrained(
        load_reference(base, dtype=dtype), adapter
    ).merge_and_unload()


@pytest.fixture(scope="module")
def expert_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "experts"
    save_adapter(base, folder, target_modules=PACKED)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_packed_experts_is_merged_to_pefts_bits(
    dtype: torch.dtype, base: Path, expert_adapter: Path, tmp_path: Path
) -> None:
    expected = merged_by_peft(base, expert_adapter, dtype)
    loaded = load(base, tmp_path / "store", adapter=expert_adapter, dtype=dtype)
    assert_holds_model(session_of(loaded).store, expected)
    assert_rest_equal(loaded, expected)
    assert not torch.equal(
        loaded.model.layers[0].self_attn.q_proj.weight,
        plain(base, dtype=dtype).model.layers[0].self_attn.q_proj.weight,
    )
    if dtype == torch.float32:
        assert torch.equal(tokens(loaded), tokens(expected))


OTHER_ADAPTERS: dict[str, dict[str, Any]] = {
    "one parameter, in one layer": {
        "target_modules": [],
        "target_parameters": ["layers.1.mlp.experts.down_proj"],
    },
    "rank-stabilised": {"target_modules": PACKED, "use_rslora": True, "lora_alpha": 3},
    "router and head": {"target_modules": ["gate", "o_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_other_adapters_are_merged_as_peft_merges_them(
    kind: str, base: Path, tmp_path: Path
) -> None:
    save_adapter(base, tmp_path / "adapter", **OTHER_ADAPTERS[kind])
    expected = merged_by_peft(base, tmp_path / "adapter", torch.float32)
    loaded = load(base, tmp_path / "store", adapter=tmp_path / "adapter")
    assert_holds_model(session_of(loaded).store, expected)
    assert_rest_equal(loaded, expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt_oss_mxfp4"])
def test_other_ways_of_storing_experts_are_merged_too(name: str, tmp_path: Path) -> None:
    base = tiny_checkpoints.write(name, tmp_path / "model")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=targets)
    dtype = torch.bfloat16 if name.endswith("mxfp4") else torch.float32
    expected = merged_by_peft(base, tmp_path / "adapter", dtype)
    loaded = load(base, tmp_path / "store", adapter=tmp_path / "adapter")
    assert_holds_model(session_of(loaded).store, expected)
    assert_rest_equal(loaded, expected)


def test_the_store_is_that_of_base_and_adapter(
    base: Path,
    expert_adapter: Path,
    attention_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def packed(adapter: Path | None) -> StoreReport:
        return pack(base, adapter=adapter, progress=False)

    with_adapter, without = packed(expert_adapter), packed(None)
    assert with_adapter.path != without.path
    assert packed(expert_adapter).reused and packed(None).reused
    assert packed(attention_adapter).path == without.path, "it adds nothing to the experts"
    with pytest.raises(StoreError, match="it holds other weights"):
        load(base, without.path, adapter=expert_adapter)
    save_adapter(base, tmp_path / "other", target_modules=PACKED, lora_alpha=5)
    assert packed(tmp_path / "other").path not in (with_adapter.path, without.path)


def test_an_adapter_that_cannot_be_merged_is_refused(
    base: Path, attention_adapter: Path, tmp_path: Path
) -> None:
    for config, match in (
        ({"target_modules": ["q_proj"], "bias": "all"}, "trained biases"),
        ({"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 3)]}, "repeats layers"),
    ):
        save_config(tmp_path / match, peft.LoraConfig(r=4, **config))
        with pytest.raises(UnsupportedModelError, match=match):
            load(base, tmp_path / "store", adapter=tmp_path / match)
    save_config(tmp_path / "prompt", peft.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(UnsupportedModelError, match="of type PROMPT_TUNING"):
        load(base, tmp_path / "store", adapter=tmp_path / "prompt")
    with pytest.raises(CheckpointError, match="cannot be put on the model"):
        load(base, tmp_path / "store", adapter=tmp_path / "nowhere")
    other = save_tiny(tmp_path / "other", layers=1)
    with pytest.raises(CheckpointError, match="cannot be put on the model"):
        load(other, tmp_path / "store", adapter=save_config(tmp_path / "empty", peft.LoraConfig()))
    with pytest.raises(CheckpointError, match=r"is an adapter: .* adapter="):
        load(attention_adapter, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def save_config(folder: Path, config: Any) -> Path:
    """An adapter's folder whose weights do not matter."""
    config.base_model_name_or_path = "base"
    config.save_pretrained(folder)
    return folder


def test_without_peft_one_sentence_says_what_to_install(
    base: Path, attention_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SpecMoEError, match="needs the package peft: run pip install"):
        load(base, tmp_path / "store", adapter=attention_adapter)


def test_the_command_line_merges_an_adapter(
    base: Path, expert_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    assert run(["pack", str(base), "--store-dir", store, "--adapter", str(expert_adapter)]) == 0
    loaded = load(base, tmp_path / "store", adapter=expert_adapter)
    assert_holds_model(
        session_of(loaded).store, merged_by_peft(base, expert_adapter, torch.float32)
    )
    assert run(["pack", str(base), "--store-dir", store]) == 2
    assert "it holds other weights" in capsys.readouterr().err
