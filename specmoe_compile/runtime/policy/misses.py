"""What a missing expert gets: it is fetched, or its default vector stands in, or it is left out.

| policy | a miss |
|---|---|
| `exact` | is fetched |
| `default_vector` | gets its default vector if its router weight is low for all its tokens |
| `commit` | does not happen: the step runs the experts that were predicted |

Steps of prefill, and layers that never speculate, are exact under every policy. What is decided by
values is here twice, side by side: for a host that has them, and for a device, whose values the
host does not read.

Shape letters: T tokens, E experts, K top-k, P predicted per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specmoe_compile.options import SessionOptions


class Choices(NamedTuple):
    """Experts and their router weights, both [T, K] or, predicted, [T, P]."""

    ids: Tensor
    weights: Tensor


class MissPolicy:
    """What the options of a session say of misses.

    Attributes:
        commits: whether a step runs what was predicted for it.
        threshold: router weight below which a miss is not fetched; None: every miss is.
    """

    def __init__(self, options: SessionOptions) -> None:
        """Take the options."""
        self._options = options
        self.commits = options.policy == "commit"
        stands_in = options.policy == "default_vector"
        self.threshold = options.default_vector_threshold if stands_in else None

    def needs_weights(self, layer: int) -> bool:
        """Whether a layer's router weights decide which of its misses are fetched."""
        return self.threshold is not None and not self._options.skips(layer)

    def committed(self, predicted: Choices, true: Choices) -> Choices:
        """What a step runs instead of its true choices, see `committed_routing`."""
        return Choices(
            *committed_routing(
                predicted.ids.to(true.ids.dtype),
                predicted.weights,
                true.ids,
                true.weights,
                use_true_weights=self._options.commit_weights == "true",
            )
        )

    def worth_fetching(
        self, rows: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
    ) -> list[int]:
        """Return the predicted experts, the most wanted ones (by weight over all tokens) first.

        Without those beyond `prefetch_width`, and those that would not be fetched if they missed.

        Args:
            rows: [T][P] experts.
            weights: [T][P].
        """
        total: dict[int, float] = {}
        heaviest: dict[int, float] = {}
        for experts, shares in zip(rows, weights, strict=True):
            pairs = sorted(zip(experts, shares, strict=True), key=lambda pair: -pair[1])
            for expert, share in pairs[: self._options.prefetch_width]:
                total[expert] = total.get(expert, 0.0) + share
                heaviest[expert] = max(share, heaviest.get(expert, share))
        floor = self.threshold
        chosen = [e for e in total if floor is None or heaviest[e] >= floor]
        return sorted(chosen, key=lambda expert: -total[expert])

    def worth_fetching_on_device(self, ids: Tensor, weights: Tensor, *, num_experts: int) -> Tensor:
        """`worth_fetching` without the host: [T, up to P], -1 for those too weak.

        Args:
            ids: [T, P] int64 or int32.
            weights: [T, P] float.
            num_experts: E.
        """
        width = self._options.prefetch_width
        if width is not None and width < ids.shape[1]:
            weights, places = weights.topk(width, dim=1)
            ids = ids.gather(1, places)
        if self.threshold is not None and ids.numel():
            heaviest = _heaviest_by_expert(ids, weights, num_experts)
            rows = ids.long().clamp(0, num_experts - 1)
            ids = torch.where(heaviest[rows] < self.threshold, -1, ids)
        return ids


def weak_misses(
    absent: Sequence[int], ids: Sequence[int], weights: Sequence[float], threshold: float
) -> tuple[int, ...]:
    """Return those of `absent` whose weight is below the threshold for each of their tokens.

    Args:
        absent: experts that are neither there nor on their way.
        ids, weights: of all choices of the step, [T * K].
        threshold: router weight.
    """
    heaviest: dict[int, float] = {}
    for expert, weight in zip(ids, weights, strict=True):
        heaviest[expert] = max(weight, heaviest.get(expert, 0.0))
    return tuple(expert for expert in absent if heaviest[expert] < threshold)


def weak_misses_on_device(
    ids: Tensor, weights: Tensor, slot_of: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Leave `weak_misses` out without the host.

    Args:
        ids: [T, K] int64 or int32; E and -1 are nobody's here.
        weights: [T, K] float.
        slot_of: [E] int32, slot of each expert or -1.
        threshold: router weight.

    Returns:
        ids to fetch, [T, K], -1 where left out; experts left out, [T, K] int32, else -1; and their
        number, [] int64.
    """
    experts = slot_of.shape[0]
    heaviest = _heaviest_by_expert(ids, weights, experts)
    weak = (slot_of < 0) & (heaviest >= 0) & (heaviest < threshold)
    left_out = weak[ids.long().clamp(0, experts - 1)] & (ids >= 0) & (ids < experts)
    kept = torch.where(left_out, -1, ids)
    skipped = torch.where(left_out, ids, -1).int()
    return kept, skipped, weak.sum()


def _heaviest_by_expert(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Largest weight of each expert, [T, K], [T, K] -> [E] float32; -1 for those not chosen.

    Ids outside 0..E-1 are nobody's.
    """
    heaviest = torch.full((experts,), -1.0, device=ids.device)
    rows, shares = ids.reshape(-1).long(), weights.reshape(-1).float()
    shares = torch.where((rows >= 0) & (rows < experts), shares, -1.0)
    return heaviest.scatter_reduce_(0, rows.clamp(0, experts - 1), shares, "amax")


def committed_routing(
    predicted: Tensor,
    predicted_weights: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    use_true_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Return the routing to execute, ids [T, K] and weights [T, K].

    Predicted weights: the K most likely predicted experts, with their predicted weights scaled so
    that a token's weights keep their sum ("Speculating Experts", arXiv 2603.19289).
    True weights: of the router's own experts those that were predicted, with its weights scaled so
    that a token's weights keep their sum; the others get weight zero. A token none of whose experts
    was predicted has nothing to renormalise and runs its predicted experts with predicted weights.

    Args:
        predicted: [T, P] expert numbers, in the dtype of `ids`; all tensors on one device.
        predicted_weights: [T, P] float.
        ids: [T, K] int64 or int32, the true router's.
        weights: [T, K] float, the true router's.
        use_true_weights: commit to the intersection instead of the prediction.
    """
    top_k = ids.shape[1]
    guess, guess_weights = predicted, predicted_weights
    if guess.shape[1] > top_k:
        totals = guess_weights.sum(dim=1, keepdim=True)
        guess_weights, place = guess_weights.topk(top_k, dim=1)
        guess = guess.gather(1, place)
        kept = guess_weights.sum(dim=1, keepdim=True)
        # All of a token's experts may be other ranks', with weight zero.
        kept = kept.clamp(min=torch.finfo(kept.dtype).tiny)
        guess_weights = guess_weights * (totals / kept)
    elif guess.shape[1] < top_k:
        missing = top_k - guess.shape[1]
        # Repeating an expert with weight zero keeps the shape and changes nothing.
        guess = torch.cat((guess, guess[:, :1].expand(-1, missing)), dim=1)
        guess_weights = torch.cat(
            (guess_weights, guess_weights.new_zeros(len(guess), missing)), dim=1
        )
    if not use_true_weights:
        return guess, guess_weights.to(weights.dtype)
    is_kept = (ids.unsqueeze(2) == predicted.unsqueeze(1)).any(dim=2)
    kept_weights = torch.where(is_kept, weights, torch.zeros_like(weights))
    kept_total = kept_weights.sum(dim=1, keepdim=True)
    scale = weights.sum(dim=1, keepdim=True) / kept_total.clamp(min=torch.finfo(weights.dtype).tiny)
    # An expert that is left out is replaced by one that runs anyway: none is fetched for nothing.
    stand_in = ids.gather(1, is_kept.long().argmax(dim=1, keepdim=True))
    own_ids = torch.where(is_kept, ids, stand_in)
    none_kept = ~is_kept.any(dim=1, keepdim=True)
    return (
        torch.where(none_kept, guess, own_ids),
        torch.where(none_kept, guess_weights.to(weights.dtype), kept_weights * scale),
    )
