"""What several ops share in plain torch: schema and checks of arguments, experts on the CPU.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import FLOAT_DTYPES, INDEX_DTYPES, check_bank, check_tensor
from specmoe_compile.kernels.packed_experts.config import reason_against
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm, apply_gate
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

# One library per process: each op module defines its own ops in it.
LIBRARY = torch.library.Library("specmoe_kernels", "FRAGMENT")


def implement(
    name: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Give an op of `LIBRARY` its bodies; `fake` checks the arguments and computes nothing."""
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"specmoe_kernels::{name}", fake, lib=LIBRARY)


BANK_SCHEMA = (
    "Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor? up_scales,"
    " Tensor? up_zeros, Tensor? up_global, Tensor? down_scales, Tensor? down_zeros,"
    " Tensor? down_global"
)
FORM_SCHEMA = (
    "bool has_gate, bool interleaved, bool transposed, str activation, float alpha, float limit,"
    " bool limit_after, str up_code, str down_code"
)
_BANK_TENSORS = len(ExpertBank._fields)


def bank_and_form(rest: Sequence[Any]) -> tuple[ExpertBank, ExpertForm]:
    """What an op's last arguments describe, in the order of `BANK_SCHEMA` and `FORM_SCHEMA`."""
    return ExpertBank(*rest[:_BANK_TENSORS]), ExpertForm.from_args(rest[_BANK_TENSORS:])


def check_experts(
    op: str, x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm
) -> tuple[int, int]:
    """Check what every expert op takes, and return H and I.

    Args:
        x: [T, H] float, contiguous.
        slots: [T, K] int32 or int64, contiguous.
        bank: see `ExpertBank`, plain weights and biases of the dtype of `x`.

    Raises:
        TypeError, ValueError: see `checks`; or an expert has 2**31 weights or more.
    """
    check_tensor(op, "x", x, ("T", "H"), FLOAT_DTYPES)
    tokens, hidden = x.shape
    check_tensor(op, "slots", slots, (tokens, "K"), INDEX_DTYPES, like=x)
    if bank.down.dim() != 3:
        raise ValueError(
            f"specmoe_kernels::{op}: down is {tuple(bank.down.shape)}, expected 3 axes"
        )
    inner = bank.sizes(form)[1]
    rows = form.up_rows(inner)
    slots_in_bank = bank.up.shape[0]
    for name, planes, code, shape in (
        ("up", bank.up_planes, form.format.up, (rows, hidden)),
        ("down", bank.down_planes, form.format.down, (hidden, inner)),
    ):
        if code.is_plain:
            laid = shape[::-1] if form.transposed else shape
            slots_axis = "S" if name == "up" else slots_in_bank
            check_bank(op, name, planes.codes, (slots_axis, *laid), (x.dtype,), like=x)
        else:
            _check_planes(op, name, planes, code, (slots_in_bank, *shape), x)
    _check_biases(op, bank, (slots_in_bank, rows, hidden), x)
    if rows * hidden >= 2**31:
        raise ValueError(
            f"specmoe_kernels::{op}: an expert's up projection of {rows} x {hidden} weights is too"
            " large, the kernels index at most 2**31 - 1"
        )
    return hidden, inner


def _check_biases(op: str, bank: ExpertBank, sizes: tuple[int, int, int], x: Tensor) -> None:
    """Refuse biases that are not [S, rows] and [S, H] in the dtype of `x`."""
    slots, rows, hidden = sizes
    if (bank.up_bias is None) != (bank.down_bias is None):
        raise ValueError(
            f"specmoe_kernels::{op}: up_bias and down_bias come together or not at all"
        )
    if bank.up_bias is not None and bank.down_bias is not None:
        check_bank(op, "up_bias", bank.up_bias, (slots, rows), (x.dtype,), like=x)
        check_bank(op, "down_bias", bank.down_bias, (slots, hidden), (x.dtype,), like=x)


def _check_planes(
    op: str,
    name: str,
    planes: WeightPlanes,
    code: WeightCode,
    shape: tuple[int, int, int],
    x: Tensor,
) -> None:
    """Refuse planes that are not those of a bank of coded weights.

    Args:
        shape: S, outputs and inputs of the weight.
    """
    slots, outputs, inputs = shape
    reason = reason_against(code, inputs)
    if reason is not None:
        raise ValueError(f"specmoe_kernels::{op}: {name}: {reason}")
    wanted = code.plane_shapes(name, outputs, inputs, x.dtype)
    for suffix, tensor in zip(("", "_scales", "_zeros", "_global"), planes, strict=True):
        plane = f"{name}{suffix}"
        if (plane in wanted) != (tensor is not None):
            raise ValueError(
                f"specmoe_kernels::{op}: {plane} is"
                f" {'missing' if tensor is None else 'given'}, and the code is {code}"
            )
        if tensor is not None:
            plane_shape, dtype = wanted[plane]
            check_bank(op, plane, tensor, (slots, *plane_shape), (dtype,), like=x)
    if planes.codes.storage_offset() % 4 or planes.codes.stride(0) % 4:
        raise ValueError(
            f"specmoe_kernels::{op}: {name} begins at byte {planes.codes.storage_offset()} with"
            f" {planes.codes.stride(0)} bytes from slot to slot, expected multiples of 4"
        )


def check_routing_weights(op: str, weights: Tensor, slots: Tensor) -> None:
    """Refuse router weights that are not [T, K] float beside `slots`."""
    check_tensor(op, "weights", weights, tuple(slots.shape), FLOAT_DTYPES, like=slots)


def compute_choices(
    y: Tensor, x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm
) -> None:
    """Write y[t, k] for every choice whose slot is not -1, with one product per slot, on the CPU.

    Sums in fp32; the intermediate and the outputs are rounded to the dtype of `x`, as in the
    kernels.

    Args:
        y: [T, K, H], dtype of `x`, contiguous; other rows stay as they are.
    """
    flat = slots.reshape(-1)
    rows_of_y = y.view(flat.shape[0], y.shape[2])
    for slot in flat.unique().tolist():
        if slot < 0:
            continue
        rows = (flat == slot).nonzero().squeeze(1)
        tokens = x[rows // slots.shape[1]]
        up, down = bank.slot_weights(slot, form)
        hidden = tokens.float() @ up.t()
        if bank.up_bias is not None:
            hidden += bank.up_bias[slot].float()
        out = apply_gate(hidden, form).to(x.dtype).float() @ down.t()
        if bank.down_bias is not None:
            out += bank.down_bias[slot].float()
        rows_of_y[rows] = out.to(x.dtype)


def reduce_choices(values: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum over K in fp32: [T, K, H] and [T, K] -> [T, H] in `dtype`."""
    return (values.float() * weights.float().unsqueeze(-1)).sum(dim=1).to(dtype)
