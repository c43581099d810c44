"""Settings of the whole suite: strict mode, fixed seeds, a fresh Dynamo for every test.

Tests run in as many processes as there are cores, so that each has one thread, and Inductor no
compile workers of its own. One process runs all tests of a file, and all of `tests/serve`: models
are compiled, arms run and servers started by fixtures of a module or package, once and not once
for each process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("SPECMOE_STRICT", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, at its first import: without a GPU, kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

_TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        folder, file = item.path.parent.relative_to(_TESTS), item.path.relative_to(_TESTS)
        item.add_marker(pytest.mark.xdist_group(str(folder if folder.name == "serve" else file)))
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_gpu)
