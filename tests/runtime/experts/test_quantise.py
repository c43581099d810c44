"""Quantising: codes near the weight, scales better than the usual ones, and records of them."""

from __future__ import annotations

import pytest
import torch

from specmoe_compile.runtime.experts.formats import quantise as module
from specmoe_compile.runtime.experts.formats.quantise import (
    QUANTISED_FORMATS,
    checked_quantize,
    quantise,
)
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, dequantise

# Root of the mean squared error of a normal distribution, beside that of its values: what the
# formats reach, with a tenth to spare.
ERRORS = {"int4": 0.09, "mxfp4": 0.12, "fp8": 0.029, "int8": 0.006}


def normal(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02


def error(weight: torch.Tensor, code: WeightCode) -> float:
    got = dequantise(quantise(weight, code), code)
    return float(((got - weight).square().mean() / weight.square().mean()).sqrt())


def test_an_unknown_format_is_refused() -> None:
    assert checked_quantize(None) is None
    with pytest.raises(ValueError, match="quantize='int3' is not valid: choose 'int4'"):
        checked_quantize("int3")


@pytest.mark.parametrize("name", QUANTISED_FORMATS)
@pytest.mark.parametrize("inputs", [64, 200])  # 200: the last group of 32 is cut
def test_codes_are_near_the_weight(name: str, inputs: int) -> None:
    code = QUANTISED_FORMATS[name].up
    planes = quantise(normal(96, inputs), code)
    for (_, (shape, dtype)), plane in zip(
        code.plane_shapes("w", 96, inputs, torch.float32).items(), planes, strict=False
    ):
        assert plane is not None and (tuple(plane.shape), plane.dtype) == (shape, dtype)
    assert error(normal(96, inputs), code) < ERRORS[name]


@pytest.mark.parametrize("name", QUANTISED_FORMATS)
def test_searching_is_better_than_the_usual_scale(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = QUANTISED_FORMATS[name].up
    weight = normal(256, 256)
    searched = error(weight, code)
    usual = dict.fromkeys(("int4", "int8", "e4m3", "e2m1"), (1.0,))
    monkeypatch.setattr(module, "_FACTORS", usual)
    assert searched <= error(weight, code)
    if name in ("int4", "mxfp4"):
        assert searched < 0.98 * error(weight, code)


@pytest.mark.parametrize("name", QUANTISED_FORMATS)
def test_rows_do_not_depend_on_what_is_quantised_beside_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, weight = QUANTISED_FORMATS[name].up, normal(7, 64)
    whole = quantise(weight, code)
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 128)
    for one, other in zip(whole, quantise(weight, code), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", QUANTISED_FORMATS)
def test_extreme_weights_stay_finite(name: str) -> None:
    """Rows of zeros, of one value, very small, very large, and bfloat16 that is not contiguous."""
    code = QUANTISED_FORMATS[name].up
    weight = torch.zeros(6, 64)
    weight[1] = 0.5
    weight[2] = 1e-30
    weight[3] = 1e30
    weight[4, 5] = -3.0
    weight[5] = torch.linspace(-1, 1, 64)
    got = dequantise(quantise(weight, code), code)
    assert got.isfinite().all()
    assert torch.equal(got[0], weight[0])
    for row in (1, 3, 4):
        torch.testing.assert_close(got[row], weight[row], rtol=0.35, atol=0)
    half = weight.bfloat16().t().contiguous().t()
    torch.testing.assert_close(
        dequantise(quantise(half, code), code)[5], got[5], rtol=0.2, atol=0.2
    )


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = normal(4, 64)
    weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, QUANTISED_FORMATS["int4"].up)
