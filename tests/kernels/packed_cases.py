"""Coded experts that the tests of the kernels share, one format for each way of decoding.

Records are filled with ones first, which are NaN in every plane of scales: what a kernel reads
beyond its planes shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm
from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode
from specmoe_compile.runtime.experts.layout import ExpertLayout
from tests.kernels.expert_cases import DEVICE, Case


def _both(code: WeightCode) -> ExpertFormat:
    return ExpertFormat(up=code, down=code)


FORMATS: Mapping[str, ExpertFormat] = {
    "mxfp4": _both(WeightCode(book="e2m1", block=(1, 32), scale="e8m0")),
    "nvfp4": _both(WeightCode(book="e2m1", block=(1, 16), scale="e4m3", has_global=True)),
    "fp8_block": _both(WeightCode(book="e4m3", block=(128, 128), scale="f32")),
    "fp8_row": _both(WeightCode(book="e4m3", block=(1, 0), scale="f32")),
    "fp8_tensor": _both(WeightCode(book="e4m3", block=(0, 0), scale="bf16")),
    "int4": _both(WeightCode(book="int4", block=(1, 32), scale="bf16")),
    "int4_zeros": _both(WeightCode(book="int4", block=(1, 128), scale="f16", has_zero=True)),
    "nf4": _both(WeightCode(book="nf4", block=(1, 64), scale="f32")),
    "int8": _both(WeightCode(book="int8", block=(1, 0), scale="f32")),
    "mixed": ExpertFormat(
        up=WeightCode(book="e4m3", block=(128, 128), scale="bf16"),
        down=WeightCode(book="int4", block=(1, 16), scale="f32", has_global=True),
    ),
}

# Root mean square of the codes of a book, where all codes are equally frequent.
_CODE_RMS = {"e2m1": 2.9, "e4m3": 1.0, "int4": 4.6, "nf4": 0.56, "int8": 74.0}


def make_packed_bank(
    form: ExpertForm,
    *,
    slots: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    bias: bool,
    device: torch.device = DEVICE,
) -> ExpertBank:
    """A bank of random codes whose outputs are about as large as their inputs.

    Args:
        form: its format says what the planes are.
        dtype: of the biases.
    """
    rows = form.up_rows(inner)
    up = "gate_up_proj" if form.has_gate else "up_proj"
    sizes = {up: (rows, hidden)}
    if bias:
        sizes[f"{up}_bias"] = (rows,)
    sizes["down_proj"] = (hidden, inner)
    if bias:
        sizes["down_proj_bias"] = (hidden,)
    shapes = form.format.tensors(sizes, dict.fromkeys(sizes, dtype))
    layout = ExpertLayout.from_shapes(shapes, form.format)
    records = torch.full((slots, layout.record_bytes), 255, dtype=torch.uint8, device=device)
    views = layout.bank_views(records)
    for name in (up, "down_proj"):
        inputs = hidden if name == up else inner
        fill_planes(views, name, form.format.code(name), std=2.0 * inputs**-0.5)
    for name, view in views.items():
        if name.endswith("_bias"):
            view.normal_()
    return ExpertBank.from_views(views)


def fill_planes(views: Mapping[str, Tensor], name: str, code: WeightCode, *, std: float) -> None:
    """Draw the planes of a weight so that its values have about this standard deviation."""
    codes = views[name]
    if code.book == "e4m3":
        values = torch.randn(codes.shape, device=codes.device)
        codes.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
    elif code.book == "int8":
        codes.copy_(torch.randint(-128, 128, codes.shape, device=codes.device))
    else:
        codes.copy_(torch.randint(0, 256, codes.shape, device=codes.device))
    scale = std / _CODE_RMS[code.book]
    if code.has_global:
        factors = views[f"{name}_global"]
        factors.copy_((torch.rand(factors.shape, device=codes.device) + 0.5) * scale)
        scale = 1.0
    scales = views[f"{name}_scales"]
    values = (torch.rand(scales.shape, device=codes.device) + 0.5) * scale
    if code.scale == "e8m0":
        scales.copy_(values.log2().round() + 127)
    elif code.scale == "e4m3":
        scales.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
    else:
        scales.copy_(values)
    if code.has_zero:
        zeros = views[f"{name}_zeros"]
        zeros.copy_(torch.randint(0, 17, zeros.shape, device=codes.device))


def make_packed_case(
    form: ExpertForm,
    format: ExpertFormat,
    *,
    tokens: int = 3,
    top_k: int = 2,
    slots: int = 4,
    hidden: int = 40,
    inner: int = 24,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> Case:
    """Random tokens, each with `top_k` different slots."""
    form = form.with_format(format)
    bank = make_packed_bank(form, slots=slots, hidden=hidden, inner=inner, dtype=dtype, bias=bias)
    chosen = torch.stack([torch.randperm(slots)[:top_k] for _ in range(tokens)])
    return Case(
        x=torch.randn(tokens, hidden, device=DEVICE).to(dtype),
        slots=chosen.to(DEVICE, torch.int32),
        weights=torch.rand(tokens, top_k, device=DEVICE).to(dtype),
        bank=bank,
        form=form,
    )
