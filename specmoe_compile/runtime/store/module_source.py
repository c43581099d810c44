"""Expert records from a model that is already in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes, dequantise
from specmoe_compile.runtime.experts.layout import StoreLayer
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    expert_parameter_names,
    release_experts,
)
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.header import layers_to_json
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.runtime.store.source_content import SourceContent
from specmoe_compile.system.machine import one_compute_thread
from specmoe_compile.system.numa import gpu_node_or_none
from specmoe_compile.system.progress import progress_bar

_SAMPLES = 64


class ModuleSource:
    """The experts of a loaded model, as a `RecordSource`.

    Its fingerprint hashes samples of every tensor; a store on disk that has the same one is
    compared in full before it is used (`store_writer`), since memory has no date that would betray
    a change.
    """

    def __init__(self, layers: Sequence[ExpertsLayer], *, name: str, top_k: int) -> None:
        self.layers: tuple[StoreLayer, ...] = tuple(layer.store_layer for layer in layers)
        self.name = name
        self.top_k = top_k
        self.source_files: dict[str, tuple[int, int]] = {}
        self.content: SourceContent | None = None
        self._modules = [layer.module for layer in layers]
        self.fingerprint = self._fingerprint()

    @property
    def on_cpu(self) -> list[bool]:
        """For each layer, whether its parameters are in RAM."""
        return [
            getattr(module, layer.layout.tensors[0].name).device.type == "cpu"
            for layer, module in zip(self.layers, self._modules, strict=True)
        ]

    @torch.no_grad()
    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        module = self._modules[layer]
        for name, view in self.layers[layer].layout.views(record).items():
            view.copy_(getattr(module, name)[expert])

    @torch.no_grad()
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(layers_to_json(self.layers), sort_keys=True).encode())
        for layer, module in zip(self.layers, self._modules, strict=True):
            for spec in layer.layout.tensors:
                flat = getattr(module, spec.name).reshape(-1)
                step = max(flat.numel() // _SAMPLES, 1)
                digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def move_to_ram(
    source: ModuleSource,
    layers: Sequence[ExpertsLayer],
    device: torch.device,
    *,
    progress: bool,
) -> RamStore:
    """Move experts into a store in RAM, each layer's parameters freed as soon as it is copied.

    The most memory used is the experts and one layer. If it is interrupted, the layers that were
    moved get parameters again, so that the model is whole.
    """
    store = RamStore(source, numa_node=gpu_node_or_none(device))
    devices = expert_devices(layers)
    moved: list[ExpertsLayer] = []
    try:
        with (
            one_compute_thread(),
            progress_bar(store.total_bytes, "Moving experts", enabled=progress) as bar,
        ):
            for layer in layers:
                for expert in range(layer.num_experts):
                    source.fill(layer.index, expert, store.record(layer.index, expert))
                    bar.update(layer.layout.record_bytes)
                release_experts(layer, device)
                moved.append(layer)
    except BaseException:
        restore_experts(moved, store, devices)
        raise
    return store


def expert_devices(layers: Sequence[ExpertsLayer]) -> list[torch.device]:
    """Return where each layer's experts are."""
    return [layer.module.get_parameter("down_proj").device for layer in layers]


@torch.no_grad()
def restore_experts(
    layers: Sequence[ExpertsLayer], store: ExpertStore, devices: Sequence[torch.device]
) -> None:
    """Give layers their parameters back, from their records.

    Records that were quantised give the values that their codes mean, in the parameters' dtype.

    Args:
        layers: whose parameters were emptied.
        store: holds their records.
        devices: where the parameters of each layer of the model were.
    """
    for layer in layers:
        record = torch.empty(layer.layout.record_bytes, dtype=torch.uint8)
        views = layer.layout.views(record)
        empty = {n: layer.module.get_parameter(n) for n in expert_parameter_names(layer.module)}
        tensors = {
            name: torch.empty(
                (layer.num_experts, *parameter.shape[1:]),
                dtype=parameter.dtype,
                device=devices[layer.index],
            )
            for name, parameter in empty.items()
        }
        format = layer.layout.format
        for expert in range(layer.num_experts):
            store.read_into(layer.index, expert, record)
            for name, tensor in tensors.items():
                value = views[name]
                if not format.is_plain and not name.endswith("_bias"):
                    value = dequantise(WeightPlanes.of(views, name), format.code(name))
                    value = value.t() if layer.module.is_transposed else value
                tensor[expert] = value
        for name, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.module.register_parameter(name, parameter)
