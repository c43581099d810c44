"""What the ops of prefill compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.reference import expert_reference
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm


def run_grouped_experts_reference(
    y: Tensor, x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm
) -> Tensor:
    """A copy of y [T, K, H] with every choice that has a slot replaced by its expert's output."""
    out = y.clone()
    for t in range(slots.shape[0]):
        for k in range(slots.shape[1]):
            if slots[t, k] >= 0:
                out[t, k] = expert_reference(x[t], int(slots[t, k]), bank, form)
    return out


def reduce_choices_reference(y: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over K, one choice after the other in fp32: [T, K, H] -> [T, H]."""
    out = torch.zeros(y.shape[0], y.shape[2], device=y.device)
    for k in range(y.shape[1]):
        out += weights[:, k, None].float() * y[:, k].float()
    return out.to(y.dtype)
