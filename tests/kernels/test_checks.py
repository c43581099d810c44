"""What the ops of `specmoe_kernels` refuse, and in which words."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.kernels.checks import check_bank, check_tensor, require_triton


def test_check_accepts_letters_and_numbers() -> None:
    check_tensor("op", "x", torch.zeros(3, 4), ["T", 4], [torch.float32])


def test_check_refuses_a_wrong_dtype_with_one_sentence() -> None:
    message = "specmoe_kernels::op: x is int64, expected float32 or float16"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        check_tensor("op", "x", torch.zeros(3).long(), ["T"], [torch.float32, torch.float16])


@pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 4, 1)])
def test_check_refuses_a_wrong_shape(shape: tuple[int, ...]) -> None:
    message = f"specmoe_kernels::op: x is {shape}, expected [T, 4]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_tensor("op", "x", torch.zeros(shape), ["T", 4], [torch.float32])


def test_check_refuses_another_device() -> None:
    with pytest.raises(ValueError, match="x is on meta, expected cpu"):
        check_tensor(
            "op", "x", torch.zeros(1, device="meta"), [1], [torch.float32], like=torch.zeros(1)
        )


def test_check_refuses_a_transposed_tensor() -> None:
    with pytest.raises(ValueError, match=r"x is not contiguous \(strides \(1, 4\)\)"):
        check_tensor("op", "x", torch.zeros(3, 4).t(), [4, 3], [torch.float32])


def test_bank_slots_may_be_apart_but_not_transposed() -> None:
    bank = torch.zeros(2, 100)
    view = bank.as_strided((2, 3, 4), (100, 4, 1), 8)
    check_bank("op", "up", view, ["S", 3, 4], [torch.float32])
    with pytest.raises(ValueError, match="each slot of up must be contiguous"):
        check_bank("op", "up", view.transpose(1, 2), ["S", 4, 3], [torch.float32])


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecMoEError, match=r"op: CUDA tensors need Triton 3\.6 or newer"):
        require_triton("op")


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import pkgutil, importlib, sys, specmoe_compile.kernels as kernels\n"
        "for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + '.'):\n"
        "    if module.name.rpartition('.')[2] in ('op', 'reference', 'checks', 'compile_spec'):\n"
        "        importlib.import_module(module.name)\n"
        "raise SystemExit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
