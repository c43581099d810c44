"""Tie a session to a model, so that its experts run through the session; and find it again.

How compiled code reaches such a model is in `hf.compiled_calls`.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.hf.compiled_calls import watch_model
from specmoe_compile.hf.experts_interface import IMPLEMENTATION, register_experts_implementation
from specmoe_compile.hf.guards import guard_model
from specmoe_compile.hf.run_ahead import install_run_ahead
from specmoe_compile.runtime.session import Session, get_session


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
    model._specmoe_session = session.handle  # type: ignore[assignment]
    weakref.finalize(model, session.close)
    watch_model(model)
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


def session_of(model: nn.Module) -> Session:
    """Return the session of an offloaded model, compiled or not, or of one inside a wrapper.

    Raises:
        SpecMoEError: the model is not offloaded, or its session is closed.
    """
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    modules = inner.modules() if isinstance(inner, nn.Module) else ()
    handles = (
        m.__dict__.get("_specmoe_session") for m in modules if "_specmoe_layer" not in m.__dict__
    )
    handle = next((handle for handle in handles if handle is not None), None)
    if handle is None:
        raise SpecMoEError(
            f"{type(inner).__name__} is not an offloaded model: load it with"
            " specmoe_compile.from_pretrained or pass it to specmoe_compile.offload"
        )
    return get_session(handle)


def _never_auto_compile(*args: Any, **kwargs: Any) -> bool:
    return False
