"""Loading with experts offloaded: the same tokens, and the same other weights."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import specmoe_compile
from specmoe_compile import api
from specmoe_compile.errors import StoreError, UnsupportedModelError
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.packing import pack
from specmoe_compile.runtime.experts.module import find_experts_layers
from specmoe_compile.runtime.store import module_source
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.system.machine import cache_folder
from tests.helpers import PATIENCE_S
from tests.runtime import tiny_checkpoints
from tests.runtime.test_packing import (
    assert_holds_model,
    assert_rest_equal,
    load_reference,
    write_packed,
)

pytestmark = pytest.mark.usefixtures("own_cache_folder")

REPOSITORY = Path(__file__).parents[2]
FAMILIES = [*tiny_checkpoints.CONFIGS, "gpt_oss_mxfp4", "deepseek_v3_fp8"]
IDS = torch.tensor([[5, 17, 80, 3, 44, 9, 61], [7, 7, 21, 90, 2, 38, 11]])


def load(folder: Path, **kwargs: Any) -> Any:
    return specmoe_compile.from_pretrained(folder, device="cpu", progress=False, **kwargs)


def generate(model: Any, new_tokens: int = 8) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=new_tokens, do_sample=False
    )
    return tokens


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=IDS).logits
    return values


@pytest.fixture(params=["disk", "ram", "offload to disk", "offload to ram"])
def how(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_models_own(name: str, how: str, tmp_path: Path) -> None:
    folder = tiny_checkpoints.write(name, tmp_path / "model")
    # Codes are computed with in float32; a model that is unpacked to bfloat16 is another one.
    dtype = {"dtype": torch.float32} if name.endswith(("mxfp4", "fp8")) else {}
    # transformers 5.17 unpacks to bfloat16, whatever it is asked for.
    reference = load_reference(folder, **dtype).to(**dtype).eval()
    expected_tokens, expected_logits = generate(reference), logits(reference)
    if how.startswith("offload"):
        loaded = load_reference(folder, **dtype).to(**dtype)
        model = specmoe_compile.offload(loaded, device="cpu", store=how.split()[-1], progress=False)
    else:
        model = load(folder, store=how, **dtype)
    session = session_of(model)
    assert session.store.kind == how.split()[-1]
    assert_holds_model(session.store, reference)
    assert_rest_equal(model, reference)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    torch.testing.assert_close(logits(model), expected_logits)
    assert torch.equal(generate(model), expected_tokens)
    specmoe_compile.close(model)


def test_bfloat16_on_request(folder: Path) -> None:
    model = load(folder, dtype="bfloat16", store="disk")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    reference = load_reference(folder, dtype=torch.bfloat16)
    assert_holds_model(session_of(model).store, reference)
    torch.testing.assert_close(logits(model), logits(reference))


def test_the_store_is_packed_once_and_found_again(folder: Path) -> None:
    first = load(folder, store="disk")
    store = session_of(first).store
    assert isinstance(store, DiskStore)
    assert store.path.parent == cache_folder()
    experts = store.path / "experts.bin"
    written = experts.stat()
    expected = generate(first)
    second = load(folder, store="disk")  # while the first one reads from it
    assert session_of(second).store is not store
    assert torch.equal(generate(second), expected)
    assert torch.equal(generate(first), expected)
    found = experts.stat()  # reading may change the time of access, and nothing else
    assert (found.st_ino, found.st_size) == (written.st_ino, written.st_size)
    assert found.st_mtime_ns == written.st_mtime_ns
    assert len(list(cache_folder().iterdir())) == 1


def test_a_packed_store_is_used(folder: Path, tmp_path: Path) -> None:
    report = pack(folder, tmp_path / "store", progress=False)
    model = load(folder, store="disk", store_dir=str(tmp_path / "store"), verify=True)
    store = session_of(model).store
    assert isinstance(store, DiskStore) and store.path == report.path
    assert not cache_folder().exists()


@pytest.mark.slow
def test_a_second_process_shares_the_store(folder: Path, tmp_path: Path) -> None:
    model = load(folder, store="disk", store_dir=tmp_path / "store")
    code = f"""
        import torch, specmoe_compile
        model = specmoe_compile.from_pretrained(
            {str(folder)!r}, device="cpu", store="disk", store_dir={str(tmp_path / "store")!r}
        )
        ids = torch.tensor({IDS.tolist()})
        print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
              do_sample=False).tolist())
    """
    assert json.loads(run_python(code)) == generate(model).tolist()


def run_python(code: str) -> str:
    """Run code in a fresh process; returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_without_a_cache_tokens_are_the_same(folder: Path) -> None:
    model = load(folder, store="disk", expert_cache=0)
    assert torch.equal(generate(model), generate(load_reference(folder)))


def test_loader_options_and_configuration_fields_go_to_transformers(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 33}))
    model = load(folder, store="ram", attn_implementation="eager", rms_norm_eps=1e-3)
    assert model.config._attn_implementation == "eager"
    assert model.config.rms_norm_eps == 1e-3
    assert model.generation_config.max_length == 33
    assert model.config.name_or_path == str(folder)
    reference = load_reference(folder)
    reference.config.rms_norm_eps = 1e-3
    assert type(model) is type(reference)


def test_a_hub_name_is_found_in_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny-moe"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = load(
        Path("someone/tiny-moe"),  # a relative path that is no folder is a name on the hub
        store="disk",
        cache_dir=str(tmp_path / "hub"),
        local_files_only=True,
    )
    assert torch.equal(generate(model), generate(load_reference(folder)))
    store = session_of(model).store
    assert isinstance(store, DiskStore) and store.path.name.startswith("tiny-moe-float32-")


def test_code_of_the_checkpoint_runs_only_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "custom"
    write_packed(tiny_checkpoints.build("qwen3_moe"), folder)
    (folder / "modeling_custom.py").write_text(
        "from transformers import Qwen3MoeForCausalLM\n"
        "class CustomForCausalLM(Qwen3MoeForCausalLM):\n"
        "    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load(folder, store="disk")) is transformers.Qwen3MoeForCausalLM
    trusted = load(folder, store="disk", trust_remote_code=True)
    assert type(trusted).__name__ == "CustomForCausalLM"
    assert torch.equal(generate(trusted), generate(load_reference(folder)))


def test_a_subfolder_is_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "outer" / "inner")
    model = load(tmp_path / "outer", store="ram", subfolder="inner")
    assert torch.equal(generate(model), generate(load_reference(folder)))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny_checkpoints.build("qwen3_moe")
    config = transformers.Qwen3MoeConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "tied")
    loaded = load(tmp_path / "tied", store="disk")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(generate(loaded), generate(load_reference(tmp_path / "tied")))


def test_no_warning_about_missing_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            load(folder, store="disk")
    finally:
        transformers.logging.disable_propagation()
    assert caplog.messages == []


def test_an_offloaded_model_can_be_asked_about_itself(folder: Path) -> None:
    model = load(folder, store="disk")
    full = load_reference(folder)
    experts = sum(
        module.get_parameter(spec.name).numel()
        for layer in find_experts_layers(full)
        for module in (layer.module,)
        for spec in layer.layout.tensors
    )
    assert model.num_parameters() == full.num_parameters() - experts
    assert "Qwen3MoeExperts" in repr(model)
    assert model.get_memory_footprint() > 0
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.to("cpu") is model
    with pytest.raises(UnsupportedModelError, match="offloaded already"):
        specmoe_compile.offload(model)


@pytest.mark.parametrize("at_layer", [0, 1])
def test_an_interrupted_offload_leaves_the_model_whole(
    at_layer: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = load_reference(folder), generate(load_reference(folder))
    real_fill = module_source.ModuleSource.fill

    def interrupted(self: Any, layer: int, expert: int, record: torch.Tensor) -> None:
        if (layer, expert) == (at_layer, 3):
            raise KeyboardInterrupt
        real_fill(self, layer, expert, record)

    monkeypatch.setattr(module_source.ModuleSource, "fill", interrupted)
    for store in ("ram", "disk"):
        with pytest.raises(KeyboardInterrupt):
            specmoe_compile.offload(model, device="cpu", store=store, progress=False)  # type: ignore[arg-type]
        assert torch.equal(generate(model), expected)
    monkeypatch.undo()
    store_of = session_of(specmoe_compile.offload(model, device="cpu", progress=False)).store
    assert isinstance(store_of, RamStore)
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_an_offload_that_fails_at_the_end_leaves_the_model_whole(
    store: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = load_reference(folder), generate(load_reference(folder))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no session today")

    monkeypatch.setattr(api, "open_session", fail)
    with pytest.raises(RuntimeError, match="no session today"):
        specmoe_compile.offload(model, device="cpu", store=store, progress=False)
    assert torch.equal(generate(model), expected)
    reference = load_reference(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name)), name


def test_a_store_in_ram_reads_a_packed_folder_and_writes_none(folder: Path, tmp_path: Path) -> None:
    model = load(folder, store="ram", store_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    pack(folder, tmp_path / "store", progress=False)
    with open(tmp_path / "store" / "experts.bin", "r+b") as file:
        file.write(b"\xff" * 64)
    with pytest.raises(StoreError, match="does not match its checksum"):
        load(folder, store="ram", store_dir=tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    pack(folder, tmp_path / "store", progress=False)
    again = load(folder, store="ram", store_dir=tmp_path / "store")
    first, second = session_of(model).store, session_of(again).store
    assert isinstance(first, RamStore) and isinstance(second, RamStore)
    assert torch.equal(first.region, second.region)


def test_an_offloaded_model_is_found_again_only_if_it_is_the_same(tmp_path: Path) -> None:
    def offload_to_disk(model: Any) -> DiskStore:
        model = specmoe_compile.offload(model, device="cpu", store="disk", progress=False)
        store = session_of(model).store
        assert isinstance(store, DiskStore)
        return store

    first = offload_to_disk(tiny_checkpoints.build("qwen3_moe"))
    written = (first.path / "experts.bin").stat().st_mtime_ns
    second = offload_to_disk(tiny_checkpoints.build("qwen3_moe"))
    assert second.path == first.path
    assert (second.path / "experts.bin").stat().st_mtime_ns == written
    changed = tiny_checkpoints.build("qwen3_moe")
    with torch.no_grad():  # one number, which the fingerprint's samples do not see
        changed.model.layers[2].mlp.experts.down_proj[3].view(-1)[1] += 1
    third = offload_to_disk(changed)
    assert third.path == first.path
    assert (third.path / "experts.bin").stat().st_mtime_ns != written
