"""A tiny checkpoint of two layers, and its unmodified model, which most files here compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import specmoe_compile
from tests.helpers import save_tiny
from tests.runtime import tiny_checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody writes into it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def offloaded(checkpoint: Path, tmp_path: Path) -> Iterator[Any]:
    """The model with its experts on disk and a cache that misses."""
    model = specmoe_compile.from_pretrained(
        checkpoint, device="cpu", store="disk", expert_cache="40%", store_dir=tmp_path / "store"
    )
    yield model
    specmoe_compile.close(model)


@pytest.fixture
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that no folder is given for are made where nobody else looks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of Qwen3-MoE with tiny experts."""
    return tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
