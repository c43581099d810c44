"""`quantize=`: the same codes by every way of loading, and a store of its own."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import specmoe_compile
from specmoe_compile.cli.main import run
from specmoe_compile.errors import CheckpointError, StoreError
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.packing import pack
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.experts.formats.quantise import QUANTISED_FORMATS, quantise
from specmoe_compile.runtime.experts.formats.weight_code import dequantise
from specmoe_compile.runtime.experts.module import expert_parameter_names, is_experts_module
from specmoe_compile.runtime.store.disk import DiskStore
from tests.runtime import tiny_checkpoints
from tests.runtime.quantised_checkpoints import write_pair
from tests.runtime.test_packing import load_reference

pytestmark = pytest.mark.usefixtures("own_cache_folder")

IDS = torch.tensor([[5, 17, 80, 3, 44, 9, 61]])


def quantised_by_hand(folder: Path, quantize: str) -> Any:
    """The plain model with every expert's weights quantised and dequantised."""
    model = load_reference(folder, dtype=torch.float32).eval()
    code = QUANTISED_FORMATS[quantize].up
    for module in model.modules():
        if not is_experts_module(module):
            continue
        for name in expert_parameter_names(module):
            if name.endswith("_bias"):
                continue
            for weight in getattr(module, name).data:
                rows = weight.t() if module.is_transposed else weight
                rows.copy_(dequantise(quantise(rows, code), code))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=IDS).logits
    return values


@pytest.mark.parametrize("how", ["disk", "ram", "offload to disk", "offload to ram"])
@pytest.mark.parametrize(("name", "quantize"), [("qwen3_moe", "int4"), ("gpt_oss", "mxfp4")])
def test_experts_are_quantised_and_nothing_else(
    how: str, name: str, quantize: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoints.write(name, tmp_path / "model")
    expected = logits(quantised_by_hand(folder, quantize))
    options: dict[str, Any] = {"device": "cpu", "quantize": quantize, "progress": False}
    if how.startswith("offload"):
        model = specmoe_compile.offload(load_reference(folder), store=how.split()[-1], **options)
    else:
        model = specmoe_compile.from_pretrained(folder, store=how, **options)
    torch.testing.assert_close(logits(model), expected)
    store = session_of(model).store
    assert store.layouts[0].format == QUANTISED_FORMATS[quantize]
    experts = [m for m in model.modules() if is_experts_module(m)]
    assert all(parameter.numel() == 0 for m in experts for parameter in m.parameters())
    specmoe_compile.close(model)


@pytest.mark.parametrize("quantize", QUANTISED_FORMATS)
def test_a_packed_store_is_found_by_its_option(quantize: str, tmp_path: Path) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    report = pack(folder, quantize=quantize, progress=False)
    assert QUANTISED_FORMATS[quantize].slug in report.path.name
    assert pack(folder, quantize=quantize, progress=False).reused
    plain = pack(folder, progress=False)
    assert plain.path != report.path
    with contextlib.closing(DiskStore.open(report.path, verify=True)) as store:
        for layout in store.layouts:
            tensors = ExpertTensors.of(
                layout.views(torch.zeros(layout.record_bytes, dtype=torch.uint8))
            )
            assert tensors.up.scales is not None and tensors.down.scales is not None
    with pytest.raises(StoreError):  # other numbers are another store
        pack(folder, report.path, progress=False)


def test_quantised_checkpoints_can_be_quantised_again(tmp_path: Path) -> None:
    folder, plain = write_pair("fp8_block", tmp_path)
    model = specmoe_compile.from_pretrained(
        folder, device="cpu", dtype="float32", quantize="int8", store="ram", progress=False
    )
    torch.testing.assert_close(logits(model), logits(quantised_by_hand(plain, "int8")))


def test_a_model_that_could_not_be_offloaded_keeps_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    model = load_reference(folder).eval()

    def fail(*args: Any) -> None:
        raise RuntimeError("no session")

    monkeypatch.setattr("specmoe_compile.api._attach", fail)
    with pytest.raises(RuntimeError, match="no session"):
        specmoe_compile.offload(model, device="cpu", quantize="int4", store="ram", progress=False)
    torch.testing.assert_close(logits(model), logits(quantised_by_hand(folder, "int4")))


def test_the_command_line_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    out = tmp_path / "pack.json"
    command = ["pack", str(folder), "--store-dir", str(tmp_path / "store")]
    assert run([*command, "--quantize", "int3"]) == 2
    said = capsys.readouterr().err
    assert "--quantize" in said and "'int3' is not one of 'int4', 'mxfp4'" in said
    assert not (tmp_path / "store").exists()
    assert run([*command, "--quantize", "int4", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["total_bytes"] > 0
    with contextlib.closing(DiskStore.open(tmp_path / "store")) as store:
        assert store.numbers == "int4, groups of 32"


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    with pytest.raises(ValueError, match="quantize='int2' is not valid: choose"):
        specmoe_compile.from_pretrained(folder, device="cpu", quantize="int2")
    model = load_reference(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3, 0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="down_proj of expert 3 cannot be quantised"):
        pack(folder, tmp_path / "store", quantize="int4", progress=False)
    assert not (tmp_path / "store").exists()
