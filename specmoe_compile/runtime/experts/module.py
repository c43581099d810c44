"""Finding the experts modules of a model, and what they hold.

An experts module is one that uses the experts interface of transformers
(`use_experts_implementation`): it holds the weights of all experts of a layer, each as one tensor
whose first dimension is E.

Shape letters: E experts, K top-k, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer

# What the decorator sets on every instance. `has_post_expert_norm` came after transformers 5.17, so
# it is read with a default wherever it matters.
_INTERFACE_ATTRIBUTES = ("config", "has_gate", "has_bias", "is_transposed", "is_concatenated")
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsLayer:
    """One MoE layer: its ordinal, the path of its experts module, and the record of its experts.

    `layout` is that of the module's own parameters until the experts' codes are known (`with_codes`
    of a checkpoint, `quantize=`). With `is_slice` the experts are one rank's, numbered from 0, and
    the id E stands for those of the other ranks.
    """

    index: int
    name: str
    module: torch.nn.Module
    num_experts: int
    layout: ExpertLayout
    is_slice: bool = False

    @property
    def store_layer(self) -> StoreLayer:
        return StoreLayer(name=self.name, num_experts=self.num_experts, layout=self.layout)


def is_experts_module(module: torch.nn.Module) -> bool:
    """Return whether a module uses the experts interface of transformers."""
    return all(hasattr(module, name) for name in _INTERFACE_ATTRIBUTES) and isinstance(
        getattr(module, "down_proj", None), torch.nn.Parameter
    )


def expert_parameter_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the parameters that hold the experts of a module, in the order of a record."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    if module.has_bias:
        return (up, f"{up}_bias", "down_proj", "down_proj_bias")
    return (up, "down_proj")


def find_experts_layers(model: torch.nn.Module) -> list[ExpertsLayer]:
    """Return the MoE layers of a model in the order of its modules.

    Raises:
        UnsupportedModelError: there is none, one is quantised or lies on several devices, or the
            model is offloaded already.
    """
    layers: list[ExpertsLayer] = []
    for name, module in model.named_modules():
        if is_experts_module(module):
            layers.append(_experts_layer(len(layers), name, module))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Mixture-of-Experts layer that specmoe can offload: "
            "none of its modules uses the experts interface of transformers."
        )
    return layers


def _experts_layer(index: int, name: str, module: torch.nn.Module) -> ExpertsLayer:
    """Describe one experts module; raises `UnsupportedModelError` for what cannot be stored."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    counts: set[int] = set()
    for parameter_name in expert_parameter_names(module):
        parameter = getattr(module, parameter_name, None)
        if not isinstance(parameter, torch.Tensor):
            raise UnsupportedModelError(
                f"The experts module {name} ({type(module).__name__}) has no {parameter_name}, "
                "which the experts interface of transformers promises."
            )
        if parameter.dtype not in _FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"The experts of {name} are quantised ({parameter.dtype}) by the library that"
                " loaded them; load the checkpoint with specmoe_compile.from_pretrained instead,"
                " which keeps its codes."
            )
        counts.add(parameter.shape[0])
        shapes[parameter_name] = (tuple(parameter.shape[1:]), parameter.dtype)
    if 0 in counts:
        raise UnsupportedModelError(
            f"The experts of {name} are gone: the model is offloaded already."
        )
    if len(counts) != 1:
        raise UnsupportedModelError(
            f"The tensors of {name} disagree about the number of experts: {sorted(counts)}."
        )
    return ExpertsLayer(
        index=index,
        name=name,
        module=module,
        num_experts=counts.pop(),
        layout=ExpertLayout.from_shapes(shapes),
    )


def with_format(
    layer: ExpertsLayer, format: ExpertFormat, dtypes: Mapping[str, torch.dtype]
) -> ExpertsLayer:
    """The layer with records of another format, whose weights are row-major.

    Args:
        layer: with the layout of its module's parameters.
        format: of its records.
        dtypes: of plain weights and biases, by name.
    """
    shapes = {
        spec.name: spec.shape[::-1] if layer.module.is_transposed else spec.shape
        for spec in layer.layout.tensors
    }
    layout = ExpertLayout.from_shapes(format.tensors(shapes, dtypes), format)
    return replace(layer, layout=layout)


def find_top_k(model: torch.nn.Module, layers: Sequence[ExpertsLayer]) -> int:
    """Return K, the most experts that one token uses in any layer.

    Routers' own `top_k` count as well as the configuration: it is they who choose. Where layers
    differ, the largest one counts, since it sizes buffers.

    Raises:
        UnsupportedModelError: nothing in the model says how many experts a token uses.
    """
    found: list[int] = []
    for layer in layers:
        parent = model.get_submodule(layer.name.rpartition(".")[0])
        # The parent block and its direct children (the router among them); not deeper, where
        # attention may have a `top_k` of its own (sparse attention indexers).
        for router in (parent, *parent.children()):
            found.extend(_top_k_values(router, (*_TOP_K_NAMES, "top_k")))
        found.extend(_top_k_values(layer.module.config, _TOP_K_NAMES))
    config = getattr(model, "config", None)
    if not found and config is not None:
        get_text_config = getattr(config, "get_text_config", None)
        for owner in (config, get_text_config() if callable(get_text_config) else None):
            found.extend(_top_k_values(owner, _TOP_K_NAMES))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say how many experts a token uses: no router has "
            f"`top_k`, and its configuration has none of {', '.join(_TOP_K_NAMES)}."
        )
    return min(max(found), max(layer.num_experts for layer in layers))


def _top_k_values(owner: object, names: Sequence[str]) -> list[int]:
    """Return the positive integers among the named attributes (a list holds one per layer)."""
    values: list[int] = []
    for name in names:
        value = getattr(owner, name, None)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, int) and not isinstance(item, bool) and item > 0:
                values.append(item)
    return values


def release_experts(layer: ExpertsLayer, device: torch.device) -> None:
    """Replace a layer's expert parameters by empty ones of the same dtype, [0, ...].

    The inner dimensions stay, so that code which reads `shape[1:]` still works.
    """
    for name in expert_parameter_names(layer.module):
        full = layer.module.get_parameter(name)
        empty = torch.nn.Parameter(
            torch.empty((0, *full.shape[1:]), dtype=full.dtype, device=device), requires_grad=False
        )
        # The loader of transformers must neither initialise them nor call them missing.
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        layer.module.register_parameter(name, empty)
