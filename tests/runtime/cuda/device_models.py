"""Models whose experts run through a `DeviceSession` on CPU tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch

from specmoe_compile.generation import attach_session
from specmoe_compile.runtime.cuda.session import DeviceSession
from specmoe_compile.runtime.experts_module import find_experts_layers, find_top_k
from specmoe_compile.runtime.module_source import ModuleSource
from specmoe_compile.runtime.ram_store import RamStore
from tests.runtime.cuda.stream_model import StreamModel


def on_device(
    plain: Any,
    streams: StreamModel,
    *,
    slots: int,
    session_class: Any = DeviceSession,
    **kwargs: Any,
) -> tuple[Any, DeviceSession]:
    """Return a copy of a plain model and the session that runs its experts, `slots` per layer."""
    model = copy.deepcopy(plain)
    layers = find_experts_layers(model)
    top_k = find_top_k(model, layers)
    store = RamStore.from_source(
        ModuleSource(layers, name=type(model).__name__, top_k=top_k), progress=False
    )
    session = session_class(
        layers,
        store,
        device=torch.device("cpu"),
        expert_cache_bytes=slots * sum(layout.record_bytes for layout in store.layouts),
        top_k=top_k,
        streams=streams,
        **kwargs,
    )
    attach_session(model, session)
    return model, session
