"""What `top_k` computes, in plain torch."""

from __future__ import annotations

from torch import Tensor


def top_k_reference(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places [T, K] of the largest of each row, the first of equal ones first."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), places[:, :k].contiguous()
