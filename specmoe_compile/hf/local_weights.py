"""Weights of a split model as plain tensors, where transformers keeps them as `DTensor`.

transformers takes the local part of a `DTensor` out at every call and puts the `DTensor` back,
which is for training and saving. A compiled call then checks each of them anew, and a single one
makes torch 2.11's AOTAutograd look at all inputs of the graph for more: on two GPUs that took
longer than the step itself.

Shape letters: V words of the vocabulary, R of them on this rank, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def keep_local_weights(model: nn.Module) -> None:
    """Make the weights of split linear layers and embeddings plain; what they compute stays.

    Embeddings that are split along the hidden size keep their `DTensor`.
    """
    from torch.distributed.tensor import DTensor, Shard

    for module in model.modules():
        if isinstance(module, nn.Linear):
            for name, weight in module.named_parameters(recurse=False):
                if isinstance(weight, DTensor):
                    setattr(module, name, _local(weight))
                    # transformers' own sign of a split layer whose weights are no DTensor.
                    module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]
        elif isinstance(module, nn.Embedding):
            rows: Tensor = module.weight
            if isinstance(rows, DTensor) and rows.placements == (Shard(0),):
                _keep_local_rows(module, rows)


def _local(weight: Any) -> nn.Parameter:
    return nn.Parameter(weight.to_local(), requires_grad=weight.requires_grad)


def _keep_local_rows(module: nn.Embedding, weight: Any) -> None:
    """Look words up in this rank's rows, [R, H], and add the ranks' findings up."""
    import torch.distributed._functional_collectives as collectives

    group: dist.ProcessGroup = weight.device_mesh.get_group()
    whole, size = weight.shape[0], group.size()
    first = min(-(-whole // size) * group.rank(), whole)  # as torch.chunk cuts, which DTensor does
    module.weight = _local(weight)
    rows = module.weight.shape[0]
    if rows == 0:  # fewer words than ranks
        module.weight = nn.Parameter(weight.new_zeros(1, weight.shape[1]), requires_grad=False)
    module.padding_idx = None  # of all words; it matters to gradients alone
    look_up = type(module).forward  # transformers' own is the instance's, and expects a DTensor

    def forward(words: Tensor) -> Tensor:
        """Vectors [..., H] of words [...]."""
        at = words - first
        missing = (at < 0) | (at >= rows)
        found: Tensor = look_up(module, at.masked_fill(missing, 0))
        own = found.masked_fill(missing.unsqueeze(-1), 0)
        summed: Tensor = collectives.wait_tensor(collectives.all_reduce(own, "sum", group))
        return summed

    module.forward = forward  # type: ignore[method-assign,assignment]
