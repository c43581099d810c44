"""Policy `commit`: which experts run, and with which weights, when predictions are not corrected.

Shape letters: T tokens, K top-k, P predicted per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        guess_weights = guess_weights * (totals / guess_weights.sum(dim=1, keepdim=True))
    elif guess.shape[1] < top_k:
        missing = top_k - guess.shape[1]
        # Repeating an expert with weight zero keeps the shape and changes nothing.
        guess = torch.cat((guess, guess[:, :1].expand(-1, missing)), dim=1)
        guess_weights = torch.cat(
            (guess_weights, guess_weights.new_zeros(len(guess), missing)), dim=1
        )
    if not use_true_weights:
        return guess, guess_weights.to(weights.dtype)
    kept = (ids.unsqueeze(2) == predicted.unsqueeze(1)).any(dim=2)
    kept_weights = torch.where(kept, weights, torch.zeros_like(weights))
    kept_total = kept_weights.sum(dim=1, keepdim=True)
    scale = weights.sum(dim=1, keepdim=True) / kept_total.clamp(min=torch.finfo(weights.dtype).tiny)
    # An expert that is left out is replaced by one that runs anyway: none is fetched for nothing.
    stand_in = ids.gather(1, kept.long().argmax(dim=1, keepdim=True))
    own_ids = torch.where(kept, ids, stand_in)
    none_kept = ~kept.any(dim=1, keepdim=True)
    return (
        torch.where(none_kept, guess, own_ids),
        torch.where(none_kept, guess_weights.to(weights.dtype), kept_weights * scale),
    )
