"""A model of full size that is split over ranks, with random experts in each rank's memory.

Shape letters: E experts, K top-k, C context.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.full_size.arms import Arm, Bench, free_memory
from benchmarks.full_size.model import (
    SEED,
    FilledCache,
    RandomStore,
    Shape,
    _experts_on_meta,
    coded,
)
from specmoe_compile.hf.local_weights import keep_local_weights
from specmoe_compile.hf.ranks import join_ranks, ranks_of_or_none
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    find_experts_layers,
    release_experts,
)


def build_split(
    shape: Shape, device: torch.device, ranks: int, *, layers: int | None
) -> tuple[Any, list[ExpertsLayer]]:
    """A random model, its experts released, and this rank's part of its MoE layers.

    All ranks draw the same weights, and transformers cuts out each rank's part.
    """
    torch.manual_seed(SEED)
    with torch.device(device), _experts_on_meta():
        model: Any = AutoModelForCausalLM.from_config(shape.configured(layers), dtype=shape.dtype)
    if ranks > 1:
        asked = join_ranks({"tp_size": ranks, "ep_size": ranks}, device)
        asked, _, meshes = type(model).prepare_distribute_model(asked)
        model.config.distributed_config = asked
        model = type(model).maybe_distribute_model(model, asked, meshes)
        keep_local_weights(model)
    found = find_experts_layers(model)
    group = ranks_of_or_none(model)
    own = found if group is None else [group.own_layer(layer) for layer in found]
    for layer in own:
        release_experts(layer, device)
    return model.eval().requires_grad_(False), [coded(layer, shape.format) for layer in own]


@dataclass(slots=True)
class SplitBench(Bench):
    """`Bench` on one of several ranks.

    Attributes:
        ranks: how many there are.
        experts: E of all of them together.
    """

    ranks: int = 1
    experts: int = 0

    def slots(self, arm: Arm) -> int:
        """S per layer and rank: a share of all experts, at most a rank's own."""
        return min(arm.slots(self.experts, self.store.top_k), self.store.num_experts[0])

    def build(self) -> tuple[Any, list[ExpertsLayer]]:
        """A random model that is split over the ranks, and this rank's part of its MoE layers."""
        return build_split(self.shape, self.device, self.ranks, layers=self.layers)


def filled_cache(bench: SplitBench, model: Any, context: int) -> FilledCache:
    """Keys and values of C tokens, of the heads that are this rank's: not all models split them."""
    own = copy.deepcopy(model.config)
    keys: Tensor = model.model.layers[0].self_attn.k_proj.weight
    own.num_key_value_heads = keys.shape[0] // own.head_dim
    return FilledCache(own, context, bench.steps.total, bench.device, bench.shape.dtype)


def open_store(shape: Shape, device: torch.device, ranks: int, layers: int | None) -> RandomStore:
    """Random records of this rank's experts, page-locked for a GPU."""
    model, found = build_split(shape, device, ranks, layers=layers)
    config = model.config
    top_k, std = config.num_experts_per_tok, config.initializer_range
    del model
    free_memory(device)
    return RandomStore(found, top_k, device, std=std)
