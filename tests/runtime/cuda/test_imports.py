"""Every module of the package can be imported without a GPU, and none of them starts CUDA."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import specmoe_compile

MODULES = [
    module.name
    for module in pkgutil.walk_packages(specmoe_compile.__path__, "specmoe_compile.")
    if not module.name.endswith("__main__")
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests may have started CUDA")
def test_all_modules_can_be_imported_without_cuda() -> None:
    pytest.importorskip("triton")  # the kernels' own modules need it, and nothing else does
    for name in MODULES:
        importlib.import_module(name)
    assert {
        "specmoe_compile.runtime.cuda.engine",
        "specmoe_compile.kernels.plan_cache.kernel",
    } <= {*MODULES}
    assert not torch.cuda.is_initialized()
