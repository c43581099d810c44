"""What several ops share in plain torch: schema and checks of arguments, experts on the CPU.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import FLOAT_DTYPES, INDEX_DTYPES, check_bank, check_tensor
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm, apply_gate

# One library per process: each op module defines its own ops in it.
LIBRARY = torch.library.Library("specmoe_kernels", "FRAGMENT")

BANK_SCHEMA = "Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias"
FORM_SCHEMA = (
    "bool has_gate, bool interleaved, bool transposed, str activation, float alpha, float limit,"
    " bool limit_after"
)


def form_of(
    has_gate: bool,
    interleaved: bool,
    transposed: bool,
    activation: str,
    alpha: float,
    limit: float,
    limit_after: bool,
) -> ExpertForm:
    """The form that an op's last arguments describe."""
    return ExpertForm(
        has_gate=has_gate,
        interleaved=interleaved,
        transposed=transposed,
        activation=activation,
        alpha=alpha,
        limit=limit,
        limit_after=limit_after,
    )


def check_experts(
    op: str, x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm
) -> tuple[int, int]:
    """Check what every expert op takes, and return H and I.

    Args:
        x: [T, H] float, contiguous.
        slots: [T, K] int32 or int64, contiguous.
        bank: see `ExpertBank`, all of the dtype of `x`.

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
    up_shape = (hidden, rows) if form.transposed else (rows, hidden)
    down_shape = (inner, hidden) if form.transposed else (hidden, inner)
    slots_in_bank = bank.up.shape[0]
    check_bank(op, "up", bank.up, ("S", *up_shape), (x.dtype,), like=x)
    check_bank(op, "down", bank.down, (slots_in_bank, *down_shape), (x.dtype,), like=x)
    if (bank.up_bias is None) != (bank.down_bias is None):
        raise ValueError(
            f"specmoe_kernels::{op}: up_bias and down_bias come together or not at all"
        )
    if bank.up_bias is not None and bank.down_bias is not None:
        check_bank(op, "up_bias", bank.up_bias, (slots_in_bank, rows), (x.dtype,), like=x)
        check_bank(op, "down_bias", bank.down_bias, (slots_in_bank, hidden), (x.dtype,), like=x)
    if rows * hidden >= 2**31:
        raise ValueError(
            f"specmoe_kernels::{op}: an expert's up projection of {rows} x {hidden} weights is too"
            " large, the kernels index at most 2**31 - 1"
        )
    return hidden, inner


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
        up, down = bank.up[slot].float(), bank.down[slot].float()
        if not form.transposed:
            up, down = up.t(), down.t()
        hidden = tokens.float() @ up
        if bank.up_bias is not None:
            hidden += bank.up_bias[slot].float()
        out = apply_gate(hidden, form).to(x.dtype).float() @ down
        if bank.down_bias is not None:
            out += bank.down_bias[slot].float()
        rows_of_y[rows] = out.to(x.dtype)


def reduce_choices(values: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum over K in fp32: [T, K, H] and [T, K] -> [T, H] in `dtype`."""
    return (values.float() * weights.float().unsqueeze(-1)).sum(dim=1).to(dtype)
