"""Tie a session to a model, so that its experts run through the session.

How compiled code reaches such a model is in `hf.compiled_calls`.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from specmoe_compile.hf.compiled_calls import watch_model
from specmoe_compile.hf.experts_interface import IMPLEMENTATION, register_experts_implementation
from specmoe_compile.hf.guards import guard_model
from specmoe_compile.hf.run_ahead import install_run_ahead
from specmoe_compile.runtime.session import Session


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


def _never_auto_compile(*args: Any, **kwargs: Any) -> bool:
    return False
