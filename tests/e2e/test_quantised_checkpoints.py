"""Quantised checkpoints: records keep the codes, and the model is the one that they mean."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import specmoe_compile
from specmoe_compile.errors import CheckpointError, SpecMoEError, UnsupportedModelError
from specmoe_compile.hf.packing import pack
from specmoe_compile.runtime.store.disk import DiskStore
from tests.runtime.quantised_checkpoints import VARIETIES, write_pair
from tests.runtime.test_packing import assert_holds_model, assert_rest_equal

pytestmark = pytest.mark.usefixtures("own_cache_folder")

IDS = torch.tensor([[5, 17, 80, 3, 44, 9, 61], [7, 7, 21, 90, 2, 38, 11], [1, 2, 3, 4, 5, 6, 7]])


def load(folder: Path, **kwargs: Any) -> Any:
    return specmoe_compile.from_pretrained(
        folder, device="cpu", progress=False, **{"dtype": "float32", **kwargs}
    )


def plain_model(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=IDS).logits
    return values


@pytest.mark.parametrize("variety", VARIETIES)
def test_a_quantised_checkpoint_is_the_model_that_it_means(variety: str, tmp_path: Path) -> None:
    """Records hold the codes, all else is dequantised; values are equal bit by bit."""
    folder, plain = write_pair(variety, tmp_path)
    reference = plain_model(plain)
    report = pack(folder, tmp_path / "store", progress=False)
    with contextlib.closing(DiskStore.open(report.path)) as store:
        format = store.layouts[0].format
        assert format.name.startswith(VARIETIES[variety].name) and not format.is_plain
        assert_holds_model(store, reference)
    model = load(folder, store="disk", store_dir=report.path, expert_cache="50%")
    assert_rest_equal(model, reference)
    torch.testing.assert_close(logits(model), logits(reference))
    specmoe_compile.close(model)


def rewrite(folder: Path, change: Any) -> None:
    """Change a checkpoint's tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **settings: Any) -> None:
    """Change the checkpoint's quantization_config; None takes a field, or all of it, away."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if settings:
        config["quantization_config"].update(settings)
    else:
        del config["quantization_config"]
    path.write_text(json.dumps(config))


def refuse(kind: type[SpecMoEError], match: str, folder: Path) -> None:
    """Loading fails with one sentence, and nothing is left behind."""
    with pytest.raises(kind, match=match) as caught:
        load(folder, store="disk", store_dir=folder / "store")
    assert "\n" not in str(caught.value)
    assert not (folder / "store").exists()


STEM = "model.layers.0.mlp.experts.3.up_proj"


def test_act_order_is_refused(tmp_path: Path) -> None:
    folder, _ = write_pair("gptq", tmp_path)

    def permute(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{STEM}.g_idx"] = tensors[f"{STEM}.g_idx"].flip(0)

    rewrite(folder, permute)
    refuse(UnsupportedModelError, "act-order", folder)


def test_gptq_whose_zeros_are_not_symmetric_as_promised_is_refused(tmp_path: Path) -> None:
    folder, _ = write_pair("gptq_zeros", tmp_path)
    configure(folder, sym=True)
    refuse(CheckpointError, "says that its GPTQ weights are symmetric", folder)


def test_gptq_and_awq_are_told_apart_by_the_configuration(tmp_path: Path) -> None:
    """AWQ's tensors have the names of GPTQ's; of square weights even shapes that are near."""
    folder, _ = write_pair("awq", tmp_path)
    configure(folder, quant_method="gptq", sym=True)
    refuse(CheckpointError, "do not fit|cannot be shared", folder)


@pytest.mark.parametrize(
    ("variety", "settings", "match"),
    [
        ("gptq", {"bits": 8}, "GPTQ with 8 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "in the format marlin"),
        ("awq", {"version": "gemv"}, "version=gemv"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "by bitsandbytes as fp4"),
        ("modelopt_nvfp4", {"quant_algo": "W4A8_AWQ"}, "by ModelOpt as W4A8_AWQ"),
        ("fp8_block", {"fmt": "e5m2"}, "weights are e5m2"),
        ("deepseek_fp4", {"expert_dtype": "fp6"}, "experts are fp6"),
        ("ct_int4", {"format": "marlin-24"}, "4 bit int in marlin-24"),
        ("ct_int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "weights are sparse"),
        ("ct_int4", {"quant_method": "quark"}, "quantised with quark; specmoe reads"),
    ],
)
def test_a_scheme_that_is_not_read_is_one_sentence(
    variety: str, settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    folder, _ = write_pair(variety, tmp_path)
    configure(folder, **settings)
    refuse(UnsupportedModelError, match, folder)


def move_to_modelopts_file(folder: Path, text: str | None = None) -> None:
    """As older exports of ModelOpt are: the configuration says nothing."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder)
    inner = {"quant_algo": settings["quant_algo"], "kv_cache_quant_algo": None, "group_size": 16}
    whole = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}
    (folder / "hf_quant_config.json").write_text(json.dumps(whole) if text is None else text)


@pytest.mark.parametrize("variety", ["modelopt_nvfp4", "modelopt_fp8"])
def test_modelopts_own_file_is_enough(variety: str, tmp_path: Path) -> None:
    folder, plain = write_pair(variety, tmp_path)
    move_to_modelopts_file(folder)
    report = pack(folder, tmp_path / "store", progress=False)
    with contextlib.closing(DiskStore.open(report.path)) as store:
        assert store.numbers.startswith(VARIETIES[variety].name)
        assert_holds_model(store, plain_model(plain))
    torch.testing.assert_close(logits(load(folder)), logits(plain_model(plain)))


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ("{", CheckpointError, "does not say how the checkpoint is quantised"),
        ("[]", CheckpointError, "does not say how the checkpoint is quantised"),
        ('{"quantization": {}}', CheckpointError, "does not say how the checkpoint is quantised"),
        (
            '{"quantization": {"quant_algo": "W4A8_AWQ"}}',
            UnsupportedModelError,
            "by ModelOpt as W4A8_AWQ",
        ),
        ('{"quantization": {"quant_algo": null}}', CheckpointError, "no quantization_config"),
    ],
)
def test_a_file_of_modelopts_that_says_nothing_is_one_sentence(
    text: str, kind: type[SpecMoEError], match: str, tmp_path: Path
) -> None:
    folder, _ = write_pair("modelopt_nvfp4", tmp_path)
    move_to_modelopts_file(folder, text)
    refuse(kind, match, folder)


@pytest.mark.parametrize("variety", ["fp8_block", "ct_int4", "gptq", "nf4"])
def test_codes_without_a_configuration_are_not_taken_for_missing_weights(
    variety: str, tmp_path: Path
) -> None:
    folder, _ = write_pair(variety, tmp_path)
    configure(folder)
    refuse(CheckpointError, "has no quantization_config to read it by", folder)


@pytest.mark.parametrize("variety", ["fp8_block", "ct_int4", "modelopt_nvfp4", "gptq", "nf4"])
@pytest.mark.parametrize("stem", [STEM, "model.layers.1.self_attn.q_proj"])
def test_a_weight_that_lacks_a_part_is_an_error(variety: str, stem: str, tmp_path: Path) -> None:
    """Nothing is drawn at random for it, be it an expert's or not."""
    folder, _ = write_pair(variety, tmp_path)
    part = {
        "fp8_block": "weight_scale_inv",
        "ct_int4": "weight_scale",
        "modelopt_nvfp4": "weight_scale_2",
        "gptq": "scales",
        "nf4": "weight.absmax",
    }[variety]
    rewrite(folder, lambda tensors: tensors.pop(f"{stem}.{part}"))
    refuse(SpecMoEError, stem.replace(".", r"\."), folder)


def test_experts_of_a_layer_that_are_coded_in_another_way_are_an_error(tmp_path: Path) -> None:
    folder, _ = write_pair("ct_fp8_channel", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{STEM}.weight_scale"
        tensors[key] = tensors[key].float()

    rewrite(folder, change)
    refuse(CheckpointError, r"experts\.3\.up_proj is .* but .*experts\.0\.up_proj", folder)


def test_a_float32_and_a_bfloat16_model_share_a_store(tmp_path: Path) -> None:
    folder, _ = write_pair("ct_int4", tmp_path)
    report = pack(folder, tmp_path / "store", progress=False, dtype="bfloat16")
    assert pack(folder, tmp_path / "store", progress=False, dtype="float32").path == report.path
    model = load(folder, dtype="bfloat16", store="disk", store_dir=report.path)
    assert model.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_the_default_folder_is_named_after_the_format(tmp_path: Path) -> None:
    folder, _ = write_pair("ct_int4", tmp_path)
    assert pack(folder, progress=False).path.name.startswith("coded-int4-g32-")
