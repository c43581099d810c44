"""What `sum_ranks` computes, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_ranks_reference(parts: Sequence[Tensor]) -> Tensor:
    """Sum of the ranks' tensors in the order of the ranks, in float32, rounded once."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)
