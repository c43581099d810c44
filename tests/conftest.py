"""Settings of the whole suite: strict mode, fixed seeds, a fresh Dynamo for every test.

Tests run in as many processes as there are cores, so that each has one thread, and Inductor no
compile workers of its own. One process runs all tests of a file, and all of `tests/serve`: models
are compiled, arms run and servers started by fixtures of a module or package, once and not once
for each process. What takes longest begins first, so that no process is left with it at the end.

Compiling makes millions of objects that refer to each other, and Python's collector looked through
all modules and tests again and again: a quarter of the time. What is there before the first test
of a file is now left out of its rounds, which are rarer, too. `gc.collect()` finds what a file's
tests drop as ever.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

os.environ.setdefault("SPECMOE_STRICT", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What Inductor checks of each tensor, and is not asked to elsewhere on a CPU.
os.environ.setdefault("TORCHINDUCTOR_SIZE_ASSERTS", "1")
os.environ.setdefault("TORCHINDUCTOR_ALIGNMENT_ASSERTS", "1")
# After every graph Dynamo would look for garbage, which the rounds below do as well.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, at its first import: without a GPU, kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# pytest listens to loggers that do not propagate, and whoever listens to this one has torch write
# down every graph and tensor that it compiles.
logging.getLogger("torch.__trace").propagate = True

_LONGEST = (
    "serve",
    "models/test_families.py",
    "ranks/test_ranks.py",
    "predict/test_trained.py",
    "passes/test_families.py",
    "cli/test_bench.py",
    "runtime/cuda/test_stream_order.py",
    "kernels/test_packed_experts.py",
    "benchmarks/test_full_size.py",
    "e2e/test_generate.py",
    "e2e/test_guard_checks.py",
    "e2e/test_replayed_steps.py",
    "e2e/test_recorded_steps.py",
    "runtime/cuda/test_fake_device.py",
    "passes/test_manager.py",
    "e2e/test_wrappers.py",
    "passes/test_end_to_end.py",
    "replay/test_replay.py",
    "cli/test_calibrate_eval.py",
    "kernels/test_decode_attention.py",
    "test_fidelity.py",
    "kernels/test_expert_mlp.py",
    "benchmarks/test_paired.py",
    "kernels/test_plan_cache.py",
    "predict/test_insert_predictor.py",
    "e2e/test_prefill_untraced.py",
    "e2e/test_quantised_generation.py",
    "runtime/test_prefetch_auto.py",
    "test_calibration.py",
    "kernels/test_sum_ranks.py",
    "runtime/cuda/test_spare_places.py",
    "passes/test_guard_speculation.py",
    "e2e/test_prompt_lengths.py",
    "runtime/test_store_writer.py",
    "e2e/test_loading_memory.py",
    "e2e/test_loading.py",
)
"""Files and folders of tests that take more than about ten seconds, roughly in order."""


@pytest.fixture(scope="session", autouse=True)
def _compiling_is_not_described() -> None:
    """Dynamo times the guards of every graph, and words what it changes, for logs alone."""
    from torch._dynamo import config, guards

    guards.profile_guard_manager = lambda *_: 0.0
    config.side_effect_replay_policy = "silent"


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def prompts_left_to_the_model() -> Iterator[None]:
    """See the function in `tests.helpers`."""
    from tests import helpers

    with helpers.prompts_left_to_the_model():
        yield


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by number of tests: the longest ones have few


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.set_threshold(50_000, 20, 100)
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_left_out() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or else C++ complains at the end that its objects are still there


def _group(nodeid: str) -> str:
    """What one process runs together: a file, or a folder that shares its servers."""
    file = nodeid.split("::", 1)[0].removeprefix("tests/")
    return "serve" if file.startswith("serve/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole groups. Marks would say it too, but pytest 9.2 and xdist 3.8 ignore them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByGroup(config, log)


def _longest_first(items: list[pytest.Item]) -> None:
    """Sort tests by group, the longest ones first, then those of many tests."""
    tests = Counter(_group(item.nodeid) for item in items)
    turns = {group: turn for turn, group in enumerate(_LONGEST)}

    def turn(item: pytest.Item) -> tuple[int, int, str]:
        group = _group(item.nodeid)
        return turns.get(group, len(turns)), -tests[group], group

    items.sort(key=turn)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        _longest_first(items)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_gpu)
