"""Models whose experts run through a `Session` on CPU tensors."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from specmoe_compile.hf.attach import attach_session
from specmoe_compile.runtime.cuda.host_trial import HostTrial
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.experts.module import find_experts_layers, find_top_k
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.module_source import ModuleSource
from specmoe_compile.runtime.store.ram import RamStore


def open_session(
    plain: Any, model: Any, streams: Any, *, slots: int, is_slice: bool = False, **kwargs: Any
) -> Session:
    """Return a session for `model` with the experts of `plain`, `slots` per layer.

    With `is_slice` they are those of one rank of several.
    """
    layers = find_experts_layers(plain)
    top_k = find_top_k(plain, layers)
    source = ModuleSource(layers, name=type(plain).__name__, top_k=top_k)
    store = RamStore.from_source(source, progress=False)
    return open_cuda_session(
        [replace(layer, is_slice=is_slice) for layer in find_experts_layers(model)],
        store,
        device=torch.device("cpu"),
        expert_cache_bytes=slots * sum(layout.record_bytes for layout in store.layouts),
        top_k=top_k,
        streams=streams,
        **kwargs,
    )


def decide_trials(monkeypatch: pytest.MonkeyPatch, *, predicts: bool) -> None:
    """Let trials on the host give the same answer in every step, whatever steps take."""

    def begin_step(trial: HostTrial) -> None:
        trial.predicts = predicts

    monkeypatch.setattr(HostTrial, "begin_step", begin_step)


def on_device(plain: Any, streams: Any, *, slots: int, **kwargs: Any) -> tuple[Any, Session]:
    """Return a copy of a plain model and the session that runs its experts, `slots` per layer."""
    model = copy.deepcopy(plain)
    session = open_session(plain, model, streams, slots=slots, **kwargs)
    attach_session(model, session)
    return model, session
