"""Bad input to loading and packing: one clear sentence, the right class, nothing lost."""

from __future__ import annotations

import errno
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import specmoe_compile
from specmoe_compile.errors import CheckpointError, StoreError, UnsupportedModelError
from specmoe_compile.hf import tier_sizes
from specmoe_compile.hf.attach import session_of
from specmoe_compile.runtime.store.disk import DiskStore
from tests.runtime import tiny_checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.write("qwen3_moe", tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def load(path: Any, tmp_path: Path, **kwargs: Any) -> Any:
    options = {"device": "cpu", "store": "disk", "store_dir": tmp_path / "store", **kwargs}
    return specmoe_compile.from_pretrained(path, progress=False, **options)


def assert_one_sentence(error: BaseException) -> None:
    """One line that ends like a sentence and can be read at a glance."""
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 600


def refuse(kind: type[Exception], match: str, path: Any, tmp_path: Path, **kwargs: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        load(path, tmp_path, **kwargs)
    assert_one_sentence(caught.value)
    assert not (tmp_path / "store").exists()


def test_not_a_moe(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "llama")
    match = "LlamaForCausalLM has no Mixture-of-Experts layer that specmoe can offload"
    refuse(UnsupportedModelError, match, tmp_path / "llama", tmp_path)
    with pytest.raises(UnsupportedModelError, match=match):
        specmoe_compile.offload(model)


def test_not_a_model_that_generates(tmp_path: Path) -> None:
    transformers.ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    match = "transformers has no text-generating model for ViTConfig"
    refuse(UnsupportedModelError, match, tmp_path / "vit", tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refuse(CheckpointError, "There is no model folder", tmp_path / "absent", tmp_path)
    refuse(CheckpointError, "There is no model folder models/moe/7b", "models/moe/7b", tmp_path)
    refuse(CheckpointError, "There is no model folder /.*/moe", "~/no/moe", tmp_path)


def test_a_name_that_the_hub_does_not_have(tmp_path: Path) -> None:
    options = {"local_files_only": True, "cache_dir": str(tmp_path / "hub")}
    refuse(
        CheckpointError,
        "nobody/nothing is no local folder, and cannot be loaded: ",
        "nobody/nothing",
        tmp_path,
        **options,
    )


def test_a_file_instead_of_a_folder(folder: Path, tmp_path: Path) -> None:
    refuse(CheckpointError, "is a file; give the model's folder", folder / "config.json", tmp_path)


def test_a_folder_without_configuration(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    refuse(CheckpointError, r"has no config\.json", folder, tmp_path)


def test_a_damaged_configuration(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"')
    refuse(CheckpointError, r"config\.json is damaged", folder, tmp_path)


def test_an_unknown_model_type(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen9_moe"}')
    refuse(UnsupportedModelError, "qwen9_moe", folder, tmp_path)


def test_a_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    refuse(CheckpointError, r"has no weights: neither model\.safetensors nor", folder, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(CheckpointError, r"pytorch_model\.bin is not safetensors", folder, tmp_path)


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuse(CheckpointError, f"lacks 1 of .* shards .* {shard.name}", folder, tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_shard(folder: Path, tmp_path: Path, kept: int) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    os.truncate(shard, kept if kept >= 0 else shard.stat().st_size - 1)
    refuse(CheckpointError, f"{shard.name} is truncated", folder, tmp_path)


def test_a_damaged_shard_header(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[8:12] = b"!!!!"
    shard.write_bytes(data)
    refuse(CheckpointError, "has a damaged safetensors header", folder, tmp_path)


def test_a_damaged_index(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    refuse(CheckpointError, r"index\.json is damaged", folder, tmp_path)


def test_a_quantised_checkpoint_that_cannot_be_unpacked(folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    settings = {"quant_method": "hqq", "bits": 4, "group_size": 128}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    refuse(UnsupportedModelError, "is quantised with hqq; specmoe reads", folder, tmp_path)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"device": "tpu"}, ValueError, "device='tpu' is not a device"),
        ({"device": "meta"}, ValueError, "device='meta' is not supported"),
        ({"dtype": "int8"}, ValueError, "dtype='int8' is not valid"),
        ({"dtype": torch.int64}, ValueError, r"dtype=torch\.int64 is not valid"),
        ({"store": "tape"}, ValueError, "store='tape' is not valid: choose 'auto', 'ram', 'disk'"),
        ({"cache_policy": "fifo"}, ValueError, "cache_policy='fifo' is not valid"),
        ({"reader_threads": 0}, ValueError, "reader_threads=0 must be at least 1"),
        ({"reader_threads": "4"}, TypeError, "reader_threads='4' must be an int"),
        ({"expert_cache": "lots"}, ValueError, "expert_cache='lots' is not a size"),
        ({"expert_cache": 0.25}, TypeError, r"expert_cache=0\.25 is a float"),
        ({"expert_cach": "1GiB"}, ValueError, "'expert_cach'. Did you mean 'expert_cache'"),
        ({"colour": "red"}, ValueError, "Unknown option 'colour'. Valid are device, dtype"),
        ({"device_map": {"": 0}}, ValueError, "device_map={'': 0} cannot be .* use device='cpu'"),
        ({"device_map": "cuda"}, ValueError, "device_map='cuda' cannot be combined with offload"),
        ({"torch_dtype": "auto"}, ValueError, "torch_dtype='auto' cannot be .* use dtype="),
        ({"use_safetensors": False}, ValueError, "specmoe reads safetensors only"),
        ({"load_in_4bit": True}, ValueError, "load_in_4bit=True .* use quantize='int4'"),
        ({"quantization_config": {}}, ValueError, "quantization_config={} cannot be combined"),
        ({"max_memory": {0: "1GiB"}}, ValueError, "max_memory=.* use expert_cache="),
    ],
)
def test_options_that_cannot_be_meant(
    folder: Path, tmp_path: Path, options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    refuse(kind, match, folder, tmp_path, **options)


def test_options_that_mean_nothing_here_are_taken(folder: Path, tmp_path: Path) -> None:
    model = load(
        folder,
        tmp_path,
        device_map="auto",
        max_memory=None,
        quantization_config=None,
        torch_dtype=None,
        low_cpu_mem_usage=True,
        load_in_4bit=False,
        load_in_8bit=None,
        use_safetensors=True,
    )
    assert not hasattr(model.config, "device_map") and not hasattr(model.config, "load_in_4bit")
    specmoe_compile.close(model)
    specmoe_compile.close(load(folder, tmp_path, device_map=None, low_cpu_mem_usage=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device(folder: Path, tmp_path: Path) -> None:
    match = r"device='cuda' is not possible: PyTorch sees no CUDA device here\. Use device="
    refuse(ValueError, match, folder, tmp_path, device="cuda")


@pytest.mark.parametrize("expert_cache", [1, "10KiB", "24.9%", "0.001%"])
def test_a_cache_smaller_than_one_tokens_experts(
    folder: Path, tmp_path: Path, expert_cache: int | str
) -> None:
    match = r"one token uses 2 experts in each of 2 layers, .* Give at least \d+ bytes \(25\.0%"
    refuse(ValueError, match, folder, tmp_path, expert_cache=expert_cache)
    model = tiny_checkpoints.build("qwen3_moe")
    with pytest.raises(ValueError, match=match):
        specmoe_compile.offload(model, store="disk", expert_cache=expert_cache)
    assert model.num_parameters() == tiny_checkpoints.build("qwen3_moe").num_parameters()


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """The folder of a store that matches the checkpoint."""
    model = load(folder, tmp_path)
    specmoe_compile.close(model)
    return tmp_path / "store"


def test_a_store_whose_header_is_damaged(folder: Path, packed: Path, tmp_path: Path) -> None:
    header = packed / "header.json"
    header.write_text(header.read_text().replace('"top_k": 2', '"top_k": 3'))
    with pytest.raises(StoreError, match=r"header\.json is damaged"):
        load(folder, tmp_path)


def test_a_store_that_is_truncated(folder: Path, packed: Path, tmp_path: Path) -> None:
    os.truncate(packed / "experts.bin", 4096)
    with pytest.raises(StoreError, match="truncated or damaged"):
        load(folder, tmp_path)


def test_a_store_whose_record_is_damaged(folder: Path, packed: Path, tmp_path: Path) -> None:
    with open(packed / "experts.bin", "r+b") as file:
        file.write(b"\xff" * 64)
    with pytest.raises(StoreError, match=r"expert 0 .* does not match its checksum"):
        load(folder, tmp_path, verify=True)
    model = load(folder, tmp_path)
    ids = torch.arange(90)[None] % 90
    with pytest.raises(specmoe_compile.SpecMoEError) as caught:
        model(input_ids=ids)
    causes = [str(caught.value), str(caught.value.__cause__)]
    assert any("does not match its checksum" in text for text in causes)


def test_a_store_of_another_model(folder: Path, packed: Path, tmp_path: Path) -> None:
    other = tiny_checkpoints.write("mixtral", tmp_path / "other")
    before = (packed / "experts.bin").read_bytes()
    with pytest.raises(StoreError, match="it holds other weights or another dtype") as caught:
        load(other, tmp_path)
    assert_one_sentence(caught.value)
    with pytest.raises(StoreError, match="it holds other weights or another dtype"):
        load(folder, tmp_path, dtype="bfloat16")
    assert (packed / "experts.bin").read_bytes() == before


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_a_store_folder_that_is_a_file(kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises(StoreError, match="a file of that name is in the way") as caught:
        load(folder, tmp_path, store=kind)
    assert_one_sentence(caught.value)
    assert (tmp_path / "store").read_text() == "mine"


def test_a_full_disk_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoints.build("qwen3_moe")
    expected = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    real_pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", _full_after(real_pwrite, 5))
    refuse(StoreError, "The disk became full", folder, tmp_path)
    monkeypatch.setattr(os, "pwrite", _full_after(real_pwrite, 5))
    with pytest.raises(StoreError, match="The disk became full"):
        specmoe_compile.offload(
            model, device="cpu", store="disk", store_dir=tmp_path / "store", progress=False
        )
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, expected)
    monkeypatch.undo()
    assert isinstance(session_of(load(folder, tmp_path)).store, DiskStore)


def _full_after(pwrite: Any, writes: int) -> Any:
    done: list[int] = []

    def limited(fd: int, data: Any, offset: int) -> int:
        done.append(offset)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count: int = pwrite(fd, data, offset)
        return count

    return limited


def test_too_little_ram(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_sizes, "available_ram_bytes", lambda: 1000)
    match = r"The experts need .* of RAM, 1000 B are free\. Use store='disk'\."
    refuse(StoreError, match, folder, tmp_path, store="ram")


def test_experts_that_are_not_in_memory(folder: Path) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder)
        )
    with pytest.raises(UnsupportedModelError, match=r"are not in memory .* instead"):
        specmoe_compile.offload(model)


def test_a_model_that_is_spread_over_devices() -> None:
    model = tiny_checkpoints.build("qwen3_moe")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(UnsupportedModelError, match="spread over 0, cpu by device_map"):
        specmoe_compile.offload(model)


def test_a_failed_load_leaves_no_open_file(folder: Path, tmp_path: Path) -> None:
    def fail() -> None:
        with pytest.raises(ValueError, match="Give at least"):
            load(folder, tmp_path, expert_cache=1)

    fail()
    gc.collect()  # what other tests dropped, and no later
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        fail()
    assert len(os.listdir("/proc/self/fd")) == before
