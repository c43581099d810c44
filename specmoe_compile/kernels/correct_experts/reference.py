"""What `correct_experts` computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.kernels.expert_mlp.reference import expert_reference
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm


def correct_experts_reference(
    partial: Tensor,
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    skipped: Tensor | None,
    default_vectors: Tensor | None,
    bank: ExpertBank,
    form: ExpertForm,
) -> Tensor:
    """out [T, H]; see `correct_experts`."""
    tokens, top_k = slots.shape
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(tokens):
        for k in range(top_k):
            if slots[t, k] >= 0:
                value = expert_reference(x[t], int(slots[t, k]), bank, form)
            elif skipped is not None and default_vectors is not None and skipped[t, k] >= 0:
                value = default_vectors[int(skipped[t, k])]
            else:
                value = partial[t, k]
            out[t] += weights[t, k].float() * value.float()
    return out.to(x.dtype)
