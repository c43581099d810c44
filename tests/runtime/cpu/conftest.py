"""What tests of the C++ engine share: small experts that it takes, a store, a count of Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specmoe_compile import ops
from specmoe_compile.runtime.cpu.native import layer
from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.session import Session, get_session
from specmoe_compile.runtime.store.writer import pack_records
from tests.runtime.fakes import K, ModuleSource
from tests.runtime.test_session import LAYERS


@pytest.fixture
def tiny_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes experts of any size."""
    if library_or_none() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(layer, "MIN_RECORD_BYTES", 0)


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """A store on disk of the fake layers."""
    folder = tmp_path / "store"
    pack_records(ModuleSource(LAYERS, K), folder)
    return folder


@pytest.fixture
def python_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls of a session by the Python bodies of ops."""
    calls: Counter[str] = Counter()

    def counted(handle: int) -> Session:
        calls["body"] += 1
        return get_session(handle)

    monkeypatch.setattr(ops, "get_session", counted)
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()
