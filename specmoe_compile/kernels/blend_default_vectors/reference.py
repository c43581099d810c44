"""What `blend_default_vectors` computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def blend_default_vectors_reference(
    ids: Tensor, weights: Tensor, default_vectors: Tensor, dtype: torch.dtype
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * default_vectors[ids[t, k]], [T, H] in `dtype`."""
    tokens, top_k = ids.shape
    out = torch.zeros(tokens, default_vectors.shape[1], device=ids.device)
    for t in range(tokens):
        for k in range(top_k):
            if ids[t, k] >= 0:
                out[t] += weights[t, k].float() * default_vectors[int(ids[t, k])].float()
    return out.to(dtype)
