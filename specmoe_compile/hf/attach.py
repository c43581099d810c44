"""Tie a session to a model, and make `generate` run the compiled graph.

`torch.compile(model)` returns an `OptimizedModule`. Its `generate` is the inner module's bound
method, which calls the inner module and so runs eagerly without a word. For a model that specmoe
offloaded we are told when the wrapper is made (PyTorch's hook on the registration of submodules)
and give the wrapper a `generate` of its own, which routes every forward call of the inner module
through the wrapper's compiled function. `model.compile(backend="specmoe")` needs no help: it
compiles in place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules.module import register_module_module_registration_hook

from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS
from specmoe_compile.hf.experts_interface import IMPLEMENTATION, register_experts_implementation
from specmoe_compile.hf.guards import guard_model
from specmoe_compile.hf.run_ahead import install_run_ahead
from specmoe_compile.runtime.session import Session

_RECOMPILE_LIMIT = 64


def attach_session(model: nn.Module, session: Session) -> None:
    """Make `model` run its experts through `session`.

    Freezes all parameters, switches to eval mode, sets the experts implementation "specmoe" and
    makes the model refuse what its records cannot follow (`guards`). The session is closed by
    `specmoe_compile.close(model)`, or when the model is collected.

    Args:
        model: a Hugging Face model whose experts modules are those of `session.layers`.
        session: open session.
    """
    register_experts_implementation()
    _watch_compile_wrappers()
    model._specmoe_session = session.handle  # type: ignore[assignment]
    weakref.finalize(model, session.close)
    for layer in session.layers:
        layer.module._specmoe_session = session.handle  # type: ignore[assignment]
        layer.module._specmoe_layer = layer.index  # type: ignore[assignment]
    model.requires_grad_(False)
    model.eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]
    for layer in session.layers:
        # A submodel may keep a configuration object of its own that the call above does not reach.
        layer.module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
    guard_model(model, session)
    # Transformers would otherwise compile `forward` by itself, with Inductor and without the
    # passes, wherever it finds a static cache on a GPU.
    model._valid_auto_compile_criteria = _never_auto_compile  # type: ignore[assignment]
    install_run_ahead(model)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache of keys and values as the keyword argument that the model's `forward` takes."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    newest, oldest = CACHE_ARGUMENTS
    return {newest if newest in parameters else oldest: cache}


def _never_auto_compile(*args: Any, **kwargs: Any) -> bool:
    return False


@functools.cache
def _watch_compile_wrappers() -> None:
    """Install the registration hook once per process."""
    register_module_module_registration_hook(_on_module_registered)


def _on_module_registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if (
        name == "_orig_mod"
        and isinstance(parent, OptimizedModule)
        and child is not None
        and "_specmoe_session" in child.__dict__
        and hasattr(child, "generate")
    ):
        # An entry of the instance, so that OptimizedModule.__getattr__ is never asked.
        parent.__dict__["generate"] = types.MethodType(_generate_compiled, parent)


def _generate_compiled(wrapper: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` of the inner model, with every forward call compiled."""
    model = wrapper._orig_mod
    with _forward_through(wrapper, model):
        return model.generate(*args, **kwargs)  # type: ignore[operator]


@contextlib.contextmanager
def _forward_through(wrapper: OptimizedModule, model: nn.Module) -> Iterator[None]:
    compiled = wrapper.__dict__.get("_specmoe_compiled_call")
    if compiled is None:
        # _call_impl and not __call__, which is what consults _compiled_call_impl.
        compiled = wrapper.dynamo_ctx(model._call_impl)
        wrapper.__dict__["_specmoe_compiled_call"] = compiled
    previous = model._compiled_call_impl

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name in CACHE_ARGUMENTS:
            _mark_static(kwargs.get(name))
        return compiled(*args, **kwargs)

    model._compiled_call_impl = forward
    try:
        # Prefill, decode, each batch size and each kind of cache are graphs of their own; past
        # Dynamo's default limit of 8 it would go on eagerly without a word.
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            yield
    finally:
        model._compiled_call_impl = previous


def _mark_static(cache: Any) -> None:
    """Say that a static cache's tensors on a GPU stay where they are: CUDA graphs may write them.

    Transformers says so itself, but not while it is traced, and here prefill is compiled too.
    """
    if not getattr(cache, "is_compileable", False):
        return
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.is_cuda
                    and not hasattr(tensor, "_dynamo_static_input_type")
                ):
                    # Without a guard: another cache is recorded anew, not compiled anew.
                    torch._dynamo.mark_static_address(tensor, guard=False)
