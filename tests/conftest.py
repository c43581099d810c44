"""Settings of the whole suite: strict mode, fixed seeds, a fresh Dynamo for every test.

Tests run in as many processes as there are cores, so that each has one thread, and Inductor no
compile workers of its own. One process runs all tests of a file, and all of `tests/serve`: models
are compiled, arms run and servers started by fixtures of a module or package, once and not once
for each process. What takes longest begins first, so that no process is left with it at the end.
"""

from __future__ import annotations

import os
from collections import Counter
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
_LONGEST = (
    "serve",
    "e2e/test_generate.py",
    "cli/test_bench.py",
    "benchmarks/test_full_size.py",
    "models/test_families.py",
    "predict/test_trained.py",
    "e2e/test_wrappers.py",
    "passes/test_families.py",
    "e2e/test_loading_memory.py",
    "passes/test_end_to_end.py",
    "test_fidelity.py",
    "e2e/test_loading.py",
    "passes/test_manager.py",
    "ranks/test_launched.py",
    "cli/test_calibrate_eval.py",
    "e2e/test_graph_results.py",
    "e2e/test_quantised_generation.py",
    "benchmarks/test_paired.py",
    "benchmarks/test_gpu_first_run.py",
    "e2e/test_prompt_lengths.py",
    "cli/test_bad_input.py",
)
"""Files and folders of tests that take more than about ten seconds, roughly in order."""


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by number of tests: the longest ones have few


def _group(item: pytest.Item) -> str:
    """What one process runs together: a file, or a folder that shares its servers."""
    folder, file = item.path.parent.relative_to(_TESTS), item.path.relative_to(_TESTS)
    return folder.name if folder.name == "serve" else file.as_posix()


def _distribute(items: list[pytest.Item]) -> None:
    """Put tests into groups, the longest ones first, then those of many tests."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    tests = Counter(map(_group, items))
    turns = {group: turn for turn, group in enumerate(_LONGEST)}
    items.sort(key=lambda item: (turns.get(_group(item), len(turns)), -tests[_group(item)]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        _distribute(items)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_gpu)
