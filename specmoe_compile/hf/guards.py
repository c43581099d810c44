"""What an offloaded model refuses, in words and before anything is touched.

Its experts are read-only records in a store: they cannot be trained, cast, moved, copied, adapted
or saved with the model. Everything else of it can, so that an adapter of its attention is loaded
and saved as on any model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from specmoe_compile.errors import SpecMoEError, UnsupportedModelError
from specmoe_compile.runtime.experts.module import ExpertsLayer, expert_parameter_names
from specmoe_compile.runtime.session import Session

_SAVE_REFUSAL = (
    "this model's experts live in its expert store, not in its parameters, so a state dict of it"
    " would be a checkpoint without experts: keep the original checkpoint, or load it with"
    " transformers to save a copy"
)
_COPY_REFUSAL = (
    "an offloaded model cannot be copied or pickled: its experts, cache and reader threads belong"
    " to one session; load the checkpoint again for a second model, which shares a store on disk"
)
_ADAPTER_REFUSAL = (
    "an adapter of the experts (PEFT's target_parameters, or target_modules such as gate_proj,"
    " up_proj, down_proj and 'all-linear', which stand for packed experts) cannot be put on a model"
    " that is offloaded already: give it to specmoe_compile.from_pretrained(base, adapter=PATH),"
    " which merges it into the records, or adapt the attention only. Load this model again, since"
    " parts of the adapter may be in it"
)


def guard_model(model: nn.Module, session: Session) -> None:
    """Make an offloaded model refuse what its records cannot follow."""
    _watch_adapters()
    here = weakref.ref(model)
    for layer in session.layers:
        layer.module.register_state_dict_post_hook(_mark_experts)
        layer.module.__deepcopy__ = _refuse_copy  # type: ignore[assignment]
        layer.module.__reduce_ex__ = _refuse_copy  # type: ignore[method-assign]
        path = layer.name.split(".")
        for depth in range(len(path) + 1):  # whatever holds experts, so that all is looked at first
            _guard_moves(model.get_submodule(".".join(path[:depth])))
    model.__deepcopy__ = _refuse_copy  # type: ignore[assignment]
    model.__reduce_ex__ = _refuse_copy  # type: ignore[method-assign]
    model.save_pretrained = functools.partial(_save, here)  # type: ignore[assignment]
    model.train = functools.partial(_train, here)  # type: ignore[method-assign]


def refuse_adapted_experts(model: nn.Module, layers: list[ExpertsLayer]) -> None:
    """Raise `UnsupportedModelError` if PEFT has wrapped experts of a model that is in memory."""
    for layer in layers:
        parent = model.get_submodule(layer.name.rpartition(".")[0])
        if type(parent).__module__.partition(".")[0] == "peft":
            raise UnsupportedModelError(
                f"{layer.name} has an adapter on its experts (PEFT's {type(parent).__name__}), "
                "which their records would not follow. Merge it first (model.merge_and_unload()), "
                "or load with specmoe_compile.from_pretrained(base, adapter=PATH)."
            )


def _guard_moves(module: nn.Module) -> None:
    here = weakref.ref(module)
    module._apply = functools.partial(_apply, here)  # type: ignore[method-assign]


def _apply(here: weakref.ref[nn.Module], fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """`nn.Module._apply`, which `to`, `half`, `cuda` and the like come down to.

    Raises:
        SpecMoEError: the experts would need another dtype or device; nothing is changed then.
    """
    module = here()
    assert module is not None, "_apply() reached a module that is gone"
    for child in module.modules() if recurse else (module,):
        if "_specmoe_layer" not in child.__dict__:
            continue
        for name in expert_parameter_names(child):
            held = child.get_parameter(name)
            moved = fn(torch.empty(0, dtype=held.dtype, device=held.device))
            if (moved.dtype, moved.device) != (held.dtype, held.device):
                raise SpecMoEError(
                    f"the experts of an offloaded model stay {held.dtype} on {held.device}, as they"
                    f" were loaded, so the model cannot be made {moved.dtype} on {moved.device}:"
                    " load it with dtype= and device=, or convert single parts of it"
                )
    return type(module)._apply(module, fn, recurse)


def _train(here: weakref.ref[nn.Module], mode: bool = True) -> nn.Module:
    """`nn.Module.train` of an offloaded model: refuses training mode before anything is traced."""
    if mode:
        raise SpecMoEError(
            "an offloaded model runs inference only: its experts are read-only records and have no"
            " gradients; load the model with transformers to train it"
        )
    module = here()
    assert module is not None, "train() reached a model that is gone"
    return nn.Module.train(module, False)


def _save(here: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained`: of the adapter that `load_adapter` has put in, and of nothing else."""
    model: Any = here()
    if not getattr(model, "_hf_peft_config_loaded", False):
        raise SpecMoEError(_SAVE_REFUSAL)
    return type(model).save_pretrained(model, *args, **kwargs)


def _refuse_copy(*args: Any, **kwargs: Any) -> NoReturn:
    raise SpecMoEError(_COPY_REFUSAL)


def _mark_experts(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put tensors that cannot be saved where a state dict would have empty experts."""
    for name in expert_parameter_names(module):
        if f"{prefix}{name}" in state:
            held = state[f"{prefix}{name}"].detach()
            state[f"{prefix}{name}"] = held.as_subclass(_ExpertsInStore)


class _ExpertsInStore(torch.Tensor):
    """An entry of a state dict that has a shape and a dtype, and no values: reading them raises.

    Whoever filters a state dict (adapters do) never sees it; whoever saves one gets an error.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise SpecMoEError(_SAVE_REFUSAL)


_ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_meta")
_HARMLESS = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
}


@functools.cache
def _watch_adapters() -> None:
    """Install the hook once per process."""
    register_module_module_registration_hook(_on_module_registered)


def _on_module_registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """PEFT puts what it adapts under `base_layer`; experts that were taken out cannot be."""
    if name == "base_layer" and child is not None and "_specmoe_layer" in child.__dict__:
        raise SpecMoEError(_ADAPTER_REFUSAL)
