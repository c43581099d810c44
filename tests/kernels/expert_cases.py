"""Experts, routings and tolerances that the tests of the expert kernels share.

Weights lie in a bank of records, as in the expert cache, with garbage (NaN) between the tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.launch import launch_down, launch_gate_up
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm
from specmoe_compile.runtime.experts.layout import ExpertLayout

# Where Triton kernels run: on the GPU, or in Triton's interpreter (tests/conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FORMS: dict[str, ExpertForm] = {
    "silu": ExpertForm(),
    "gelu": ExpertForm(activation="gelu"),
    "gelu_tanh": ExpertForm(activation="gelu_tanh"),
    "relu": ExpertForm(activation="relu"),
    "no_gate_relu2": ExpertForm(has_gate=False, activation="relu2"),
    "no_gate_transposed": ExpertForm(has_gate=False, activation="silu", transposed=True),
    "interleaved": ExpertForm(interleaved=True),
    "transposed": ExpertForm(transposed=True),
    "gpt_oss": ExpertForm(
        activation="swiglu_oai", alpha=1.702, limit=0.7, interleaved=True, transposed=True
    ),
    "limited": ExpertForm(limit=0.5),
    "limited_after": ExpertForm(limit=0.2, limit_after=True),
}

# The kernels and the references add the same fp32 products in different orders, then round to the
# dtype: a sum may land on the neighbouring number, and the weighted sum adds K of those.
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}


def form_and_dtype(forms: Collection[str] = tuple(FORMS)) -> pytest.MarkDecorator:
    """Every form in each dtype; float16, which rounds where bfloat16 does, of few forms only.

    The others in float16 are slow tests.
    """
    return pytest.mark.parametrize(
        ("form", "dtype"),
        [
            pytest.param(
                FORMS[name],
                dtype,
                id=f"{name}-{dtype}",
                marks=pytest.mark.slow if dtype == torch.float16 and name not in IN_FLOAT16 else (),
            )
            for name in forms
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ],
    )


IN_FLOAT16 = ("silu", "gpt_oss")


@dataclass(frozen=True, kw_only=True)
class Case:
    """x [T, H], slots [T, K], weights [T, K] and the bank that they use."""

    x: Tensor
    slots: Tensor
    weights: Tensor
    bank: ExpertBank
    form: ExpertForm


def make_bank(
    form: ExpertForm,
    *,
    slots: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    bias: bool,
    device: torch.device = DEVICE,
) -> ExpertBank:
    """A bank of random experts whose outputs are about as large as their inputs."""
    rows = form.up_rows(inner)
    name = "gate_up_proj" if form.has_gate else "up_proj"
    up = (hidden, rows) if form.transposed else (rows, hidden)
    down = (inner, hidden) if form.transposed else (hidden, inner)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: (up, dtype)}
    if bias:
        shapes[f"{name}_bias"] = ((rows,), dtype)
    shapes["down_proj"] = (down, dtype)
    if bias:
        shapes["down_proj_bias"] = ((hidden,), dtype)
    layout = ExpertLayout.from_shapes(shapes)
    # All bits set is NaN in every float dtype.
    records = torch.full((slots, layout.record_bytes), 255, dtype=torch.uint8, device=device)
    views = layout.bank_views(records)
    for key, view in views.items():
        inputs = hidden if key.startswith(name) else inner
        scale = 1.0 if key.endswith("bias") else 2.0 * inputs**-0.5
        view.copy_(torch.randn(view.shape, device=device) * scale)
    return ExpertBank.from_views(views)


def make_case(
    form: ExpertForm,
    *,
    tokens: int = 3,
    top_k: int = 2,
    slots: int = 5,
    hidden: int = 40,
    inner: int = 24,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    device: torch.device = DEVICE,
    index_dtype: torch.dtype = torch.int32,
) -> Case:
    """Random tokens, each with `top_k` different slots."""
    bank = make_bank(
        form, slots=slots, hidden=hidden, inner=inner, dtype=dtype, bias=bias, device=device
    )
    chosen = torch.stack([torch.randperm(slots)[:top_k] for _ in range(tokens)])
    return Case(
        x=torch.randn(tokens, hidden, device=device).to(dtype),
        slots=chosen.to(device, index_dtype),
        weights=torch.rand(tokens, top_k, device=device).to(dtype),
        bank=bank,
        form=form,
    )


def nan_like(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output buffer whose old contents would show."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def run_kernels(case: Case, *, partial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both decode launches on NaN-filled buffers; returns y [T, K, H] and out [T, H]."""
    tokens, top_k = case.slots.shape
    hidden, inner = case.bank.sizes(case.form)
    intermediate = nan_like(tokens, top_k, inner, dtype=case.x.dtype)
    y = nan_like(tokens, top_k, hidden, dtype=case.x.dtype)
    out = nan_like(tokens, hidden, dtype=case.x.dtype)
    launch_gate_up(case.x, case.slots, case.bank, case.form, intermediate)
    launch_down(
        intermediate, case.slots, case.weights, case.bank, case.form, out, partial=partial, y=y
    )
    return y, out
