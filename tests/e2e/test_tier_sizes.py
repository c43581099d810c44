"""Which tier the experts get, and how large their cache is, where nobody says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import specmoe_compile
from specmoe_compile import backend
from specmoe_compile.errors import StoreError
from specmoe_compile.hf import tier_sizes
from specmoe_compile.hf.attach import session_of
from specmoe_compile.runtime.experts.module import find_experts_layers
from specmoe_compile.system.compilers import COMPILING_BYTES
from tests.runtime import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("own_cache_folder")


def load(folder: Path, **kwargs: Any) -> Any:
    return specmoe_compile.from_pretrained(folder, device="cpu", progress=False, **kwargs)


def set_free_ram(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """Beside what compiling takes."""
    total = free_bytes + COMPILING_BYTES
    monkeypatch.setattr(tier_sizes, "available_ram_bytes", lambda: total)


@pytest.mark.parametrize(("free_share", "expected"), [(1.5, "disk"), (1.8, "ram")])
def test_auto_takes_ram_if_sixty_percent_hold_the_experts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free_share: float, expected: str
) -> None:
    """Of what is free once the rest of the model is there."""
    model = tiny_checkpoints.build("qwen3_moe")
    layers = find_experts_layers(model)
    total = sum(layer.store_layer.total_bytes for layer in layers)
    rest = sum(parameter.nbytes for parameter in model.parameters()) - total
    set_free_ram(monkeypatch, rest + int(total * free_share))
    assert session_of(load(folder)).store.kind == expected


def test_offload_counts_the_parameters_it_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoints.build("qwen3_moe")
    layers = find_experts_layers(model)
    total = sum(layer.store_layer.total_bytes for layer in layers)
    set_free_ram(monkeypatch, int(total * 0.8))
    offloaded = specmoe_compile.offload(model, device="cpu", progress=False)
    assert session_of(offloaded).store.kind == "ram"


def session_slots(model: Any) -> int:
    cache = session_of(model).engine.cache
    assert cache is not None
    return len(cache.expert_of[0])


def test_auto_refuses_what_would_be_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_sizes, "available_ram_bytes", lambda: 50_000)
    with pytest.raises(StoreError, match=r"512\.0 MiB to compile, 48\.8 KiB are free") as caught:
        load(folder, store="auto")
    assert str(caught.value).endswith("store='disk'.")
    assert session_of(load(folder, store="disk")).store.kind == "disk"


def test_auto_runs_uncompiled_where_compiling_would_be_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (tier_sizes, backend):
        monkeypatch.setattr(module, "available_ram_bytes", lambda: 500 << 20)
    model = load(folder, store="auto")
    assert session_of(model).store.kind == "disk"
    assert "512.0 MiB to compile, 500.0 MiB are free" in caplog.text
    ids = torch.tensor([[5, 6, 7]])
    eager = model(ids).logits
    with pytest.raises(BackendCompilerFailed, match=r"512\.0 MiB of RAM, 500\.0 MiB are free"):
        torch.compile(model, backend="specmoe")(ids)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="specmoe", options={"lowering": "eager"})
    torch.testing.assert_close(compiled(ids).logits, eager)


def test_the_default_cache_leaves_room_where_ram_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_sizes, "_DEFAULT_CACHE", "100%")
    assert session_slots(load(folder, store="disk")) == 8
    model = tiny_checkpoints.build("qwen3_moe")
    layers = find_experts_layers(model)
    total = sum(layer.store_layer.total_bytes for layer in layers)
    rest = sum(parameter.nbytes for parameter in model.parameters()) - total
    set_free_ram(monkeypatch, rest + total)
    assert session_slots(load(folder, store="disk")) == 4  # 60 % of 8


@pytest.mark.parametrize(
    ("expert_cache", "slots"),
    [(None, 2), ("50%", 4), ("100%", 8), (1 << 30, 8), ("1GiB", 8), ("25%", 2)],
)
def test_the_cache_gets_the_bytes_that_were_asked_for(
    folder: Path, expert_cache: int | str | None, slots: int
) -> None:
    session = session_of(load(folder, store="disk", expert_cache=expert_cache))
    assert session.engine.cache is not None
    for layer, layout in zip(session.layers, session.store.layouts, strict=True):
        plan = session.engine.cache.plan(layer.index, range(slots))
        assert len(plan.fills) == slots and not plan.bypassed
        assert session.engine.cache.plan(layer.index, range(8)).hits == plan.fills
        assert layout == layer.layout
