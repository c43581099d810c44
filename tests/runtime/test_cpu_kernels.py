"""The compiled one-token kernel equals the plain products, for each form it takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from specmoe_compile.runtime.cpu import kernels
from specmoe_compile.runtime.cpu.kernels import MIN_WEIGHT_BYTES, one_token_kernel_or_none


@pytest.fixture(autouse=True)
def free_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as compiling takes, whatever else runs here."""
    monkeypatch.setattr(kernels, "available_ram_bytes", lambda: kernels.COMPILING_BYTES)


def silu_gate(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * up


def make(
    hidden: int, inner: int, dtype: torch.dtype, *, biased: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.1).to(dtype)

    return (
        tensor(2 * inner, hidden),
        tensor(2 * inner) if biased else None,
        tensor(hidden, inner),
        tensor(hidden) if biased else None,
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_plain_products(dtype: torch.dtype, biased: bool) -> None:
    up, up_bias, down, down_bias = make(72, 1030, dtype, biased=biased)
    kernel = one_token_kernel_or_none(silu_gate, up, up_bias, down, down_bias)
    assert kernel is not None
    x = torch.randn(72, generator=torch.Generator().manual_seed(2)).to(dtype)
    double = [None if t is None else t.double() for t in (up, up_bias, down, down_bias)]
    inner = silu_gate(functional.linear(x.double(), double[0], double[1]))
    want = functional.linear(inner, double[2], double[3])
    got = kernel(x, up, up_bias, down, down_bias)
    assert got.shape == (72,) and got.dtype == dtype
    # Rounding only: the intermediate and the output are rounded to dtype, as in torch.mm.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got.double() - want).norm() <= tolerance * want.norm()


def test_kernel_is_repeatable_to_the_bit() -> None:
    up, _, down, _ = make(128, 512, torch.float32, biased=False)
    kernel = one_token_kernel_or_none(silu_gate, up, None, down, None)
    assert kernel is not None
    x = torch.randn(128)
    first = kernel(x, up, None, down, None)
    assert all(torch.equal(first, kernel(x, up, None, down, None)) for _ in range(20))


def test_small_and_transposed_experts_are_left_to_the_blas() -> None:
    up, _, down, _ = make(16, 32, torch.float32, biased=False)
    assert (up.numel() + down.numel()) * 4 < MIN_WEIGHT_BYTES
    assert one_token_kernel_or_none(silu_gate, up, None, down, None) is None
    up, _, down, _ = make(128, 512, torch.float32, biased=False)
    columns = up.t().contiguous().t()
    assert one_token_kernel_or_none(silu_gate, columns, None, down, None) is None


def test_gate_with_tensors_of_its_own_is_left_alone() -> None:
    up, _, down, _ = make(128, 512, torch.float32, biased=False)
    scale = torch.nn.Parameter(torch.ones(512))
    assert one_token_kernel_or_none(lambda h: silu_gate(h) * scale, up, None, down, None) is None


def test_without_the_ram_to_compile_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler that takes more than a control group may have ends this process."""
    up, _, down, _ = make(136, 520, torch.float32, biased=False)  # a shape of this test alone
    monkeypatch.setattr(kernels, "available_ram_bytes", lambda: kernels.COMPILING_BYTES - 1)
    for _ in range(2):
        assert one_token_kernel_or_none(silu_gate, up, None, down, None) is None
    assert caplog.text.count("512.0 MiB of RAM, and 512.0 MiB are free") == 1
