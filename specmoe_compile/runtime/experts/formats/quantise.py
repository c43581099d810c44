"""Quantising a weight: the codes that come nearest to it, with scales that are searched.

For each block, scales below and above the usual one (the largest magnitude gets the largest code)
are tried, and the one with the least mean squared error is kept; a last step then fits the scale to
the codes by least squares.

Shape letters: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat
from specmoe_compile.runtime.experts.formats.weight_code import (
    SCALE_DTYPES,
    WeightCode,
    WeightPlanes,
    decode_scales,
)

_INT4 = WeightCode(book="int4", block=(1, 32), scale="bf16")
_INT8 = WeightCode(book="int8", block=(1, 32), scale="bf16")
_FP8 = WeightCode(book="e4m3", block=(1, 0), scale="f32")
_MXFP4 = WeightCode(book="e2m1", block=(1, 32), scale="e8m0")

QUANTISED_FORMATS: Mapping[str, ExpertFormat] = {
    "int4": ExpertFormat(up=_INT4, down=_INT4),
    "mxfp4": ExpertFormat(up=_MXFP4, down=_MXFP4),
    "fp8": ExpertFormat(up=_FP8, down=_FP8),
    "int8": ExpertFormat(up=_INT8, down=_INT8),
}
"""What `quantize=` can be."""

METHOD = 1
"""Counts up when the codes of a weight change; it is in the fingerprint of a quantised store."""

_CHUNK_WEIGHTS = 1 << 20
# Shares of the usual scale. int4 has one code more below zero than above: negative scales use it.
_FACTORS: Mapping[str, Sequence[float]] = {
    "int4": (1.0, 0.94, 0.88, 0.82, 0.76, -0.95, -0.89, -0.83, -0.77, -0.71),
    "int8": (1.0, 0.97),
    "e4m3": (1.0, 0.5, 0.25),
    "e2m1": (2.0, 1.0, 0.5),
}


def checked_quantize(quantize: str | None) -> str | None:
    """Return the option `quantize`; raises `ValueError` for what it cannot be."""
    if quantize is not None and quantize not in QUANTISED_FORMATS:
        raise ValueError(
            f"quantize={quantize!r} is not valid: choose {', '.join(map(repr, QUANTISED_FORMATS))},"
            " or None to keep the checkpoint's own numbers."
        )
    return quantize


def quantise(values: Tensor, code: WeightCode) -> WeightPlanes:
    """Quantise a weight.

    Args:
        values: [N, K] float, any strides.
        code: whose scales belong to single rows, without zeros and global factors.

    Returns:
        Planes of the code, on the CPU.

    Raises:
        ValueError: a value is not finite.
    """
    assert code.block[0] == 1 and code.scale is not None
    assert not code.has_zero and not code.has_global
    outputs, inputs = values.shape
    rows = max(_CHUNK_WEIGHTS // inputs, 1)
    parts = [
        _quantise_rows(values[first : first + rows].float(), code)
        for first in range(0, outputs, rows)
    ]
    return WeightPlanes(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def _quantise_rows(values: Tensor, code: WeightCode) -> tuple[Tensor, Tensor]:
    """Codes and scales of a few rows, [n, K] float32 contiguous."""
    if not bool(values.isfinite().all()):
        raise ValueError("a weight is not finite")
    assert code.scale is not None
    rows, inputs = values.shape
    group = code.block[1] or inputs
    cut = -inputs % group
    x = torch.nn.functional.pad(values, (0, cut)).view(rows, -1, group)
    nearest = code.functions.nearest
    usual = x.abs().amax(-1, keepdim=True) / code.functions.largest
    usual = torch.where(usual == 0, torch.ones_like(usual), usual)

    best = torch.full_like(usual, torch.inf)
    kept = usual
    for factor in _FACTORS[code.book]:
        scale = _rounded(usual * factor, code.scale)
        error = (nearest(x / scale) * scale - x).square().sum(-1, keepdim=True)
        kept = torch.where(error < best, scale, kept)
        best = torch.minimum(error, best)
    codes = nearest(x / kept)
    if code.scale != "e8m0":
        norm = codes.square().sum(-1, keepdim=True)
        fitted = (codes * x).sum(-1, keepdim=True) / norm
        fitted = _rounded(torch.where(norm == 0, kept, fitted), code.scale)
        error = (nearest(x / fitted) * fitted - x).square().sum(-1, keepdim=True)
        kept = torch.where(error < best, fitted, kept)
    planes = code.functions.encode((x / kept).view(rows, -1)[:, :inputs].contiguous())
    return planes, _scale_plane(kept[..., 0], code.scale)


def _rounded(scale: Tensor, kind: str) -> Tensor:
    """The nearest scale that a plane can hold and that is not 0, in float32."""
    plane = _scale_plane(scale, kind)
    rounded = decode_scales(plane, kind)
    return torch.where(rounded == 0, torch.full_like(rounded, _SMALLEST), rounded)


_SMALLEST = 2.0**-126


def _scale_plane(scale: Tensor, kind: str) -> Tensor:
    if kind == "e8m0":
        return (torch.floor(torch.log2(scale)) + 127).clamp(0, 254).to(torch.uint8)
    return scale.to(SCALE_DTYPES[kind])
