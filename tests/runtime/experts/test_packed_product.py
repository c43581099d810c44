"""Experts computed from codes are those of the dequantised weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specmoe_compile.runtime.cpu import packed
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat, ExpertTensors
from specmoe_compile.runtime.experts.formats.weight_code import (
    WeightCode,
    WeightPlanes,
    dequantise,
)
from specmoe_compile.runtime.experts.layout import ExpertLayout
from tests.runtime.experts.test_weight_code import ALL, FP8_BLOCK, INT4_ZEROS, MXFP4, random_planes


@pytest.mark.parametrize("code", ALL, ids=lambda c: f"{c.book}-{c.scale}-{c.block}-{c.has_zero}")
@pytest.mark.parametrize("chunk_rows", [1, 100, 1000])
def test_chunks_make_the_whole_product(
    code: WeightCode, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "CHUNK_WEIGHTS", chunk_rows * 192)
    planes = WeightPlanes.of(random_planes(code, 300, 192), "w")
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ dequantise(planes, code).double().t()
    got = packed.packed_product(x, planes, code)
    assert got.dtype == torch.float32
    # float32 sums of 192 products
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def experts_module(dtype: torch.dtype, *, transposed: bool) -> Any:
    """What a runner asks of a module: its gate, and parameters for their dtype alone."""
    return SimpleNamespace(
        has_gate=True,
        is_transposed=transposed,
        gate_up_proj=torch.empty(0, dtype=dtype),
        _apply_gate=lambda h: h[..., ::2] * torch.sigmoid(h[..., 1::2]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_runner_computes_from_codes(dtype: torch.dtype, transposed: bool) -> None:
    """Up and down are coded apart, biases are bfloat16, rows stay as they are in the record."""
    format = ExpertFormat(up=MXFP4, down=INT4_ZEROS)
    shapes = {
        "gate_up_proj": (128, 64),
        "gate_up_proj_bias": (128,),
        "down_proj": (64, 64),
        "down_proj_bias": (64,),
    }
    tensors = format.tensors(shapes, dict.fromkeys(shapes, torch.bfloat16))
    layout = ExpertLayout.from_shapes(tensors, format)
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    views = layout.views(record)
    for name, code in (("gate_up_proj", format.up), ("down_proj", format.down)):
        for plane, value in random_planes(code, *shapes[name]).items():
            views[plane.replace("w", name, 1)].copy_(value)
        views[f"{name}_bias"].normal_(generator=torch.Generator().manual_seed(2))
    runner = ExpertRunner(experts_module(dtype, transposed=transposed), layout, 1)
    assert (runner.dtype, runner.hidden_size) == (dtype, 64)

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype) / 64
    got = runner.run(runner.weights(record), x)

    named = ExpertTensors.of(views)
    assert named.up_bias is not None and named.down_bias is not None
    hidden = x.float() @ dequantise(named.up, format.up).t() + named.up_bias.float()
    hidden = hidden.to(dtype)
    hidden = hidden[..., ::2] * torch.sigmoid(hidden[..., 1::2])
    expected = hidden.float() @ dequantise(named.down, format.down).t() + named.down_bias.float()
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-5, atol=1e-4)


def test_rows_of_planes_are_whole_blocks() -> None:
    planes = WeightPlanes.of(random_planes(FP8_BLOCK, 300, 192), "w")
    whole = dequantise(planes, FP8_BLOCK)
    for first, count in ((0, 128), (128, 128), (256, 44)):
        part = dequantise(planes.rows(first, count, FP8_BLOCK), FP8_BLOCK)
        assert torch.equal(part, whole[first : first + count])
