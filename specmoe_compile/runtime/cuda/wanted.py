"""Which experts of a step are worth fetching, decided on the device: the host reads no value.

Shape letters: T tokens, E experts, K top-k, P predicted per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.options import SpeculationConfig


def most_wanted(
    ids: Tensor, weights: Tensor, config: SpeculationConfig, *, num_experts: int
) -> Tensor:
    """Return the predictions to fetch, [T, up to P], -1 for those too weak.

    Args:
        ids: [T, P] int64 or int32.
        weights: [T, P] float.
        config: its width and threshold.
        num_experts: E.
    """
    width = ids.shape[1]
    if config.prefetch_width is not None and config.prefetch_width < width:
        width = config.prefetch_width
    if width < ids.shape[1]:
        weights, places = weights.topk(width, dim=1)
        ids = ids.gather(1, places)
    if config.policy == "default_vector" and ids.numel():
        # A miss below the threshold would not be fetched.
        heaviest = heaviest_by_expert(ids, weights, num_experts)
        ids = torch.where(heaviest[ids.long()] < config.default_vector_threshold, -1, ids)
    return ids


def skip_weak_misses(
    ids: Tensor, weights: Tensor, slot_of: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out absent experts whose weight is below the threshold for each of their tokens.

    Args:
        ids: [T, K] int64 or int32.
        weights: [T, K] float.
        slot_of: [E] int32, slot of each expert or -1.
        threshold: router weight.

    Returns:
        ids to fetch, [T, K], -1 where left out; experts left out, [T, K] int32, else -1; and their
        number, [] int64.
    """
    heaviest = heaviest_by_expert(ids, weights, slot_of.shape[0])
    weak = (slot_of < 0) & (heaviest >= 0) & (heaviest < threshold)
    left_out = weak[ids.long()]
    kept = torch.where(left_out, -1, ids)
    skipped = torch.where(left_out, ids, -1).int()
    return kept, skipped, weak.sum()


def heaviest_by_expert(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Largest weight of each expert, [T, K], [T, K] -> [E] float32; -1 for those not chosen."""
    heaviest = torch.full((experts,), -1.0, device=ids.device)
    return heaviest.scatter_reduce_(0, ids.reshape(-1).long(), weights.reshape(-1).float(), "amax")
