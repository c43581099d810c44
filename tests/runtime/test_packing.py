"""Packing: any hub format gives the loader's own bits, one expert at a time."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from specmoe_compile.errors import CheckpointError, StoreError, UnsupportedModelError
from specmoe_compile.hf import checkpoint as checkpoint_module
from specmoe_compile.hf.model_loader import Skeleton, load_without_experts, read_experts
from specmoe_compile.hf.packing import pack
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes, dequantise
from specmoe_compile.runtime.experts.module import expert_parameter_names, is_experts_module
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.runtime.store.writer import StoreReport
from specmoe_compile.system.machine import cache_folder
from tests.runtime import tiny_checkpoints

REPOSITORY = Path(__file__).parents[2]
FAMILIES = [*tiny_checkpoints.CONFIGS, "gpt_oss_mxfp4", "deepseek_v3_fp8"]


def pack_quietly(path: Path, store: Path | None = None, **kwargs: Any) -> StoreReport:
    return pack(path, store, progress=False, **kwargs)


def load_reference(folder: Path, **kwargs: Any) -> Any:
    """The checkpoint as transformers loads it, quantised weights unpacked."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(folder, config=config, **kwargs)


def assert_holds_model(store: ExpertStore, model: torch.nn.Module) -> None:
    """Every record equals the loaded model's parameters bit by bit, and none is left out."""
    modules = [m for m in model.modules() if is_experts_module(m)]
    assert len(modules) == len(store.layers) > 0
    for layer, module in enumerate(modules):
        for expert in range(store.num_experts[layer]):
            layout = store.layouts[layer]
            record = torch.empty(layout.record_bytes, dtype=torch.uint8)
            store.read_into(layer, expert, record)
            views = layout.views(record)
            names = expert_parameter_names(module)
            assert layout.format.is_plain is (tuple(views) == names)
            for name in names:
                parameter = getattr(module, name)
                assert parameter.shape[0] == store.num_experts[layer]
                value = views[name]
                if layout.format.is_plain:
                    assert value.dtype == parameter.dtype
                elif not name.endswith("_bias"):
                    code = layout.format.code(name)
                    value = dequantise(WeightPlanes.of(views, name), code)
                    value = value.t() if module.is_transposed else value
                value = value.to(parameter.dtype)
                assert torch.equal(value, parameter[expert]), f"{layer} {expert} {name}"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_hub_format_gives_the_loaders_own_bits(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoints.write(name, tmp_path / "model")
    reference = load_reference(folder)
    report = pack_quietly(folder, tmp_path / "store", verify=True)
    assert not report.reused and report.experts > 0
    with contextlib.closing(DiskStore.open(report.path)) as store:
        assert store.total_bytes == report.total_bytes
        assert store.top_k == 2
        assert_holds_model(store, reference)
    stores: list[RamStore] = []

    def fill_ram(skeleton: Skeleton) -> None:
        stores.append(RamStore.from_source(skeleton.source, progress=False))

    model: Any = load_without_experts(
        folder, dtype="auto", device=torch.device("cpu"), hf_options={}, place_experts=fill_ram
    )
    assert_holds_model(stores[0], reference)
    assert type(model) is type(reference)
    assert_rest_equal(model, reference)


def assert_rest_equal(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Experts' parameters are empty; every other parameter and buffer equals the reference's."""
    wanted, got = dict(reference.named_parameters()), dict(model.named_parameters())
    assert wanted.keys() == got.keys()
    empty = 0
    for name, parameter in got.items():
        owner = reference.get_submodule(name.rpartition(".")[0])
        assert parameter.dtype == wanted[name].dtype
        if is_experts_module(owner) and name.rpartition(".")[2] in expert_parameter_names(owner):
            assert parameter.numel() == 0 and parameter.shape[1:] == wanted[name].shape[1:]
            empty += 1
        else:
            assert torch.equal(parameter, wanted[name]), name
    assert empty > 0
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_are_cast_when_packed(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoints.write(name, tmp_path / "model")
    full = pack_quietly(folder, tmp_path / "float32")
    half = pack_quietly(folder, tmp_path / "bfloat16", dtype="bfloat16")
    with contextlib.closing(DiskStore.open(half.path)) as store:
        assert_holds_model(store, load_reference(folder, dtype=torch.bfloat16))
    assert half.total_bytes < full.total_bytes
    with pytest.raises(StoreError, match="another dtype"):
        pack_quietly(folder, tmp_path / "float32", dtype=torch.bfloat16)


def test_experts_that_the_model_keeps_in_float32_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["mlp.experts.down_proj", "norm"]
    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "_keep_in_fp32_modules_strict", kept)
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    reference = load_reference(folder, dtype=torch.bfloat16)
    experts = reference.model.layers[0].mlp.experts
    assert (experts.gate_up_proj.dtype, experts.down_proj.dtype) == (torch.bfloat16, torch.float32)
    report = pack_quietly(folder, tmp_path / "store", dtype="bfloat16")
    with contextlib.closing(DiskStore.open(report.path)) as store:
        assert_holds_model(store, reference)


def write_packed(model: Any, folder: Path) -> None:
    """Write a checkpoint whose tensors are the model's own parameters, experts packed."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_with_packed_experts_is_read_by_rows(tmp_path: Path) -> None:
    model = tiny_checkpoints.build("qwen3_moe")
    write_packed(model, tmp_path / "model")
    report = pack_quietly(tmp_path / "model", tmp_path / "store")
    with contextlib.closing(DiskStore.open(report.path)) as store:
        assert_holds_model(store, model)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "ernie4_5_vl_moe"])
def test_one_read_is_at_most_one_expert(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoints.write(name, tmp_path / "model")
    sizes: list[int] = []
    real_read = checkpoint_module.CheckpointTensor._read

    def counted(self: Any, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        sizes.append(stop - start)
        return real_read(self, shape, start, stop)

    monkeypatch.setattr(checkpoint_module.CheckpointTensor, "_read", counted)
    largest: list[int] = []

    def place(skeleton: Skeleton) -> None:
        RamStore.from_source(skeleton.source, progress=False)
        largest.append(max(layer.layout.payload_bytes for layer in skeleton.layers))

    read_experts(folder, dtype="auto", hf_options={}, place_experts=place)
    assert 0 < max(sizes) < largest[0]


def test_a_second_pack_writes_nothing(tmp_path: Path) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    first = pack_quietly(folder, tmp_path / "store")
    experts = tmp_path / "store" / "experts.bin"
    before = experts.stat()
    second = pack_quietly(folder, tmp_path / "store")
    assert (first.reused, second.reused) == (False, True)
    after = experts.stat()  # reading may change the time of access, and nothing else
    for name in ("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, name) == getattr(before, name), name
    # The folder's name does not matter, what is in it does.
    shutil.copytree(folder, tmp_path / "copy")
    assert pack_quietly(tmp_path / "copy", tmp_path / "store").reused


def test_a_fine_tuned_checkpoint_gets_a_store_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny_checkpoints.write("mixtral", tmp_path / "model")
    first = pack_quietly(folder)
    assert first.path.parent == cache_folder() == tmp_path / "cache" / "specmoe"
    assert first.path.name.startswith("model-float32-")
    model = load_reference(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder, max_shard_size="60KB")
    second = pack_quietly(folder)
    assert second.path != first.path and not second.reused
    with contextlib.closing(DiskStore.open(second.path)) as store:
        assert_holds_model(store, model)
    with pytest.raises(StoreError, match="it holds other weights or another dtype"):
        pack_quietly(folder, first.path)


def test_a_checkpoint_without_some_expert_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoints.build("mixtral")
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = {}
    with checkpoint_module.Checkpoint([path]) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if "layers.1" not in name or "experts.3.w1" not in name:
                tensors[name] = tensor.read()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        pack_quietly(tmp_path / "model", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    tensors = {name: t for name, t in tensors.items() if ".w2." not in name}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weights for .*experts\.down_proj"):
        pack_quietly(tmp_path / "model", tmp_path / "store")


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"\(64, 64\), the configuration expects \(96, 64\)"):
        pack_quietly(folder, tmp_path / "store", moe_intermediate_size=48)


def test_what_is_not_a_moe_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no Mixture-of-Experts"):
        pack_quietly(tmp_path / "llama", tmp_path / "store")
