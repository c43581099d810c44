"""What the decode kernels compute, one choice at a time, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm, apply_gate


def expert_reference(x: Tensor, slot: int, bank: ExpertBank, form: ExpertForm) -> Tensor:
    """Output of one expert for one token, [H] -> [H], rounded where the kernels round."""
    up, down = bank.slot_weights(slot, form)
    hidden = torch.mv(up, x.float())
    if bank.up_bias is not None:
        hidden = hidden + bank.up_bias[slot].float()
    inner = apply_gate(hidden, form).to(x.dtype)
    out = torch.mv(down, inner.float())
    if bank.down_bias is not None:
        out = out + bank.down_bias[slot].float()
    return out.to(x.dtype)


def run_resident_experts_reference(
    x: Tensor,
    slots: Tensor,
    bank: ExpertBank,
    form: ExpertForm,
    partial: Tensor | None = None,
) -> Tensor:
    """y [T, K, H]; see `run_resident_experts`."""
    tokens, top_k = slots.shape
    y = x.new_zeros(tokens, top_k, x.shape[1]) if partial is None else partial.clone()
    for t in range(tokens):
        for k in range(top_k):
            slot = int(slots[t, k])
            if slot >= 0:
                y[t, k] = expert_reference(x[t], slot, bank, form)
    return y


def run_experts_decode_reference(
    x: Tensor, slots: Tensor, weights: Tensor, bank: ExpertBank, form: ExpertForm
) -> Tensor:
    """out [T, H]; see `run_experts_decode`."""
    y = run_resident_experts_reference(x, slots, bank, form)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for k in range(slots.shape[1]):
        out += weights[:, k, None].float() * y[:, k].float()
    return out.to(x.dtype)
