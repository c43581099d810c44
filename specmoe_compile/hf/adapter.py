"""An adapter (PEFT) merged while a model is loaded: experts as they are packed, the rest after.

PEFT itself reads the adapter: it is put on a copy of the model without weights (on the meta
device), which brings all of PEFT's conversions of names, ranks and targets. What it adds to packed
experts (`ParamWrapper`: rank-r factors per expert) goes into the records one expert at a time; what
it does to other layers is merged by PEFT on the loaded parameters.

Shape letters: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from specmoe_compile.errors import CheckpointError, SpecMoEError, UnsupportedModelError
from specmoe_compile.runtime.experts.module import ExpertsLayer

_NAME = "default"


class Adapter:
    """A LoRA adapter, read; `digest` names what it adds to the experts, None if nothing."""

    def __init__(
        self,
        skeleton: nn.Module,
        layers: Sequence[ExpertsLayer],
        path: str | os.PathLike[str],
    ) -> None:
        """Read an adapter for a model.

        Args:
            skeleton: the model on the meta device, with its full parameters.
            layers: its MoE layers.
            path: the adapter's folder, or its name on the hub.

        Raises:
            SpecMoEError: PEFT is not installed.
            CheckpointError: there is no adapter, or it does not fit the model.
            UnsupportedModelError: it cannot be merged.
        """
        peft = _import_peft()
        self._path = str(path)
        bare = copy.deepcopy(skeleton)
        # PEFT puts its layers around these modules, which stay the same objects.
        self._homes = [
            (module, leaf, f"{name}.{leaf}" if name else leaf)
            for name, module in bare.named_modules()
            for leaf in (*module._parameters, *module._buffers)
        ]
        experts = {layer.name: bare.get_submodule(layer.name) for layer in layers}
        try:
            config = peft.PeftConfig.from_pretrained(path)
            _check_kind(config, self._path)
            self._ghost = _put_on(peft, bare, config, path)
        except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
            if isinstance(error, SpecMoEError):
                raise
            raise _does_not_fit(self._path, error) from error
        self._wrappers = {
            name: _unwrap(self._ghost, module, name) for name, module in experts.items()
        }
        self.digest = self._digest_or_none()

    def add_to(self, layer: str, expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add to one expert's tensors, in place, what the adapter adds to them.

        Args:
            layer: path of the experts module.
            expert: its number.
            tensors: its tensors, [O, I] or [I, O], on the CPU, by their name.
        """
        for name, wrapper in self._wrappers[layer].items():
            tensors[name] += _expert_delta(wrapper, expert).to(tensors[name].dtype)

    def merge_into(self, model: nn.Module) -> None:
        """Merge into the parameters of the loaded model, in place; experts are left alone."""
        for module, leaf, name in self._homes:
            owner = model.get_submodule(name.rpartition(".")[0])
            if leaf in module._parameters:
                module._parameters[leaf] = owner._parameters[leaf]
            else:
                module._buffers[leaf] = owner._buffers[leaf]
        _move_adapter(self._ghost, {id(p) for p in model.parameters()}, model)
        with torch.no_grad():
            merged = self._ghost.merge_and_unload()
            for name, value in merged.named_parameters():
                held = model.get_parameter(name)
                if held is not value:  # a layer that was saved as a whole
                    held.data.copy_(value)

    def _digest_or_none(self) -> str | None:
        digest = hashlib.sha256()
        for layer, wrappers in self._wrappers.items():
            for name, wrapper in wrappers.items():
                digest.update(f"{layer}.{name}:{wrapper.scaling[_NAME]}:".encode())
                for factor in _factors(wrapper):
                    digest.update(f"{factor.dtype}{tuple(factor.shape)}".encode())
                    digest.update(factor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest() if any(self._wrappers.values()) else None


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise SpecMoEError(
            "adapter= needs the package peft: run pip install 'specmoe-compile[adapters]'."
        ) from error
    return peft


def _put_on(peft: Any, bare: nn.Module, config: Any, path: str | os.PathLike[str]) -> Any:
    """Put an adapter with its weights, in RAM, on a model whose own are on the meta device.

    Raises:
        ValueError: the adapter lacks weights, or has some for modules that are not there.
    """
    own = {id(parameter) for parameter in bare.parameters()}
    config.inference_mode = True
    ghost = peft.get_peft_model(bare, config, adapter_name=_NAME, low_cpu_mem_usage=True)
    added: set[str] = set()
    for name, parameter in ghost.named_parameters():
        if id(parameter) not in own:
            added.add(name)
            holder = ghost.get_submodule(name.rpartition(".")[0])
            # PEFT computes with adapters in float32, whatever they were saved in.
            holder._parameters[name.rpartition(".")[2]] = nn.Parameter(
                torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False
            )
    weights = peft.load_peft_weights(str(path), device="cpu")
    result = peft.set_peft_model_state_dict(ghost, weights, adapter_name=_NAME)
    lacking = sorted(added.intersection(result.missing_keys))
    if lacking or result.unexpected_keys:
        raise ValueError(
            f"it has no weights for {lacking[0]}"
            if lacking
            else f"the model has no {result.unexpected_keys[0]}"
        )
    return ghost


def _does_not_fit(path: str, error: Exception) -> CheckpointError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return CheckpointError(f"The adapter {path} cannot be put on the model: {first}.")


def _check_kind(config: Any, path: str) -> None:
    """Raise `UnsupportedModelError` for an adapter that cannot be merged as a whole."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    why = None
    if kind != "LORA":
        why = f"it is of type {kind}, and only LORA is merged"
    elif config.bias != "none":
        why = f"it has trained biases (bias={config.bias!r})"
    elif getattr(config, "layer_replication", None):
        why = "it repeats layers (layer_replication)"
    if why is not None:
        raise UnsupportedModelError(
            f"The adapter {path} cannot be merged while the model is loaded: {why}. Merge it with "
            "PEFT (merge_and_unload) and save the model, or, if it leaves the experts alone, put "
            "it on the offloaded model with PeftModel.from_pretrained."
        )


def _unwrap(ghost: Any, experts: nn.Module, name: str) -> dict[str, Any]:
    """Take PEFT's wrappers off an experts module; returns them by the parameter they adapt.

    Raises:
        UnsupportedModelError: something else than LoRA on the parameters is around it.
    """
    from peft.tuners.lora.layer import ParamWrapper

    base = ghost.get_base_model()
    parent_name, _, leaf = name.rpartition(".")
    holder: Any = base.get_submodule(parent_name)
    current: Any = getattr(holder, leaf)
    wrappers: dict[str, Any] = {}
    while isinstance(current, ParamWrapper):
        wrappers[current.parameter_name] = current
        current = current.base_layer
    if current is not experts:
        raise UnsupportedModelError(
            f"The adapter replaces {name} by {type(current).__name__}, which cannot be merged into "
            "records; only LoRA on the experts' parameters can."
        )
    setattr(holder, leaf, experts)
    return wrappers


def _factors(wrapper: Any) -> Iterator[torch.Tensor]:
    """The two factors of a wrapper: A, [E * r, I], and B, [O, r * E]."""
    yield wrapper.lora_A[_NAME].weight.detach().cpu()
    yield wrapper.lora_B[_NAME].weight.detach().cpu()


@torch.no_grad()
def _expert_delta(wrapper: Any, expert: int) -> torch.Tensor:
    """What a wrapper adds to one expert: `ParamWrapper.get_delta_weight` for that expert alone."""
    count = wrapper.num_experts
    a, b = _factors(wrapper)
    a = a.reshape(count, -1, a.shape[-1])[expert : expert + 1]
    b = b.reshape(b.shape[0], -1, count)[:, :, expert : expert + 1]
    target = "e o i" if wrapper._did_swap_in_out_features else "e i o"
    delta: torch.Tensor = torch.einsum(f"o r e, e r i -> {target}", b, a) * wrapper.scaling[_NAME]
    return delta[0]


def _move_adapter(ghost: nn.Module, held: set[int], model: nn.Module) -> None:
    """Put the adapter's own parameters where the model's are."""
    device = next(p.device for p in model.parameters() if p.numel() > 0)
    for parameter in ghost.parameters():
        if id(parameter) not in held and parameter.device.type != "meta":
            parameter.data = parameter.data.to(device)
