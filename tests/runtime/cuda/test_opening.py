"""What is refused before a session on a CUDA device opens; needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import specmoe_compile
from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.runtime.cuda.opening import _device_of
from tests.helpers import tiny_qwen3_moe


def test_a_model_on_several_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(UnsupportedModelError, match="spans cpu, meta"):
        _device_of(model)


def test_a_model_on_one_device_has_that_device() -> None:
    assert _device_of(nn.Linear(2, 2)) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_one_sentence(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"device='{device}' is not possible: PyTorch sees no"):
        specmoe_compile.offload(tiny_qwen3_moe(layers=1), device=device)
