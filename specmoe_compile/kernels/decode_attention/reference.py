"""What `attended_range` and `decode_attention` compute, in plain torch.

Shape letters: B sequences, N query heads, G heads of keys and values, Q new tokens, S cache
length, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_attended(mask: Tensor) -> Tensor:
    """Which entries of a mask let a key through: True, or above the lowest value of its dtype."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def attended_range_reference(mask: Tensor) -> Tensor:
    """First and one past the last key that any query of a sequence attends to, [B, 2] int32.

    Args:
        mask: [B, 1 or N, 1 or Q, S]. A query that attends to nothing averages over all keys if the
            mask is additive, so that all of them are in the range.
    """
    attended = is_attended(mask).flatten(1, 2)
    length = mask.shape[-1]
    places = torch.arange(length, device=mask.device)
    first = torch.where(attended, places, length).amin(dim=(1, 2))
    last = torch.where(attended, places + 1, 0).amax(dim=(1, 2))
    if mask.dtype != torch.bool:
        averages = ~attended.any(-1).all(-1)
        first, last = first.masked_fill(averages, 0), last.masked_fill(averages, length)
    first = torch.minimum(first, last)
    return torch.stack((first, last), dim=1).to(torch.int32)


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, scale: float
) -> Tensor:
    """softmax(q k^T scale + mask, sinks) v in float32, [B, N, Q, D] in the dtype of q.

    A query that a boolean mask lets attend to nothing gives zeros.

    Args:
        q: [B, N, Q, D]; k, v: [B, G, S, D], each of its heads shared by N / G query heads.
        mask: [1 or B, 1 or N, 1 or Q, S], boolean or additive.
        sinks: [N], a score of each head that takes part in its softmax and has no value.
    """
    repeats = q.shape[1] // k.shape[1]
    keys, values = (part.float().repeat_interleave(repeats, dim=1) for part in (k, v))
    scores = q.float() @ keys.transpose(2, 3) * scale
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask.float()
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]].nan_to_num(0.0)
    return (weights @ values).to(q.dtype)
