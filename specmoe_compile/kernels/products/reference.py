"""What `products` computes, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def products_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> list[Tensor]:
    """x [1, I] times each weight [N, I], plus its bias [N]: sums in float32, rounded once."""
    outs = [torch.mm(x.float(), weight.float().t()) for weight in weights]
    if biases:
        outs = [out + bias.float() for out, bias in zip(outs, biases, strict=True)]
    return [out.to(x.dtype) for out in outs]
