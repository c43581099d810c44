"""Several processes that run one model together: transformers' expert parallelism under torchrun.

transformers splits the model as its `DistributedConfig` says, and adds up the ranks' outputs of
every MoE layer. Here are the checks beforehand, what of the experts is a rank's own, and how a
failure of one rank reaches the others.

Shape letters: E experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

from specmoe_compile.errors import SpecMoEError, StoreError, UnsupportedModelError
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.slice import own_experts

TIME_LIMIT = timedelta(minutes=30)
"""How long a rank waits for the others: longer than packing or compiling takes."""
_ALL_REDUCE = ("auto", "all_reduce")


class Ranks:
    """The ranks that share a model's experts, seen from one of them.

    Attributes:
        rank: this process's, from 0.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def own_layer(self, layer: ExpertsLayer) -> ExpertsLayer:
        """What of a layer is this rank's; raises `UnsupportedModelError` if it is uneven."""
        return replace(layer, num_experts=own_experts(layer.num_experts, self.size), is_slice=True)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Do something on all ranks: it ends once all are done, and with an error if one failed.

        Args:
            what: for the message to the ranks that did not fail.

        Raises:
            SpecMoEError: another rank failed; the one that did raises its own error.
        """
        failure: str | None = None
        try:
            yield
        except BaseException as error:
            failure = str(error) or type(error).__name__
            raise
        finally:
            failures = self.gather(failure)
            for rank, said in enumerate(failures):
                if failure is None and said is not None:
                    raise SpecMoEError(f"Rank {rank} of {self.size} failed {what}: {said}")

    def check_same_store(self, store: ExpertStore) -> None:
        """Raise `StoreError` on all ranks if they opened stores of different weights."""
        kinds = [f"{f[:12]} ({kind})" for f, kind in self.gather((store.fingerprint, store.kind))]
        if len(set(kinds)) > 1:
            raise StoreError(
                f"The ranks opened different expert stores: {', '.join(kinds)}. Give all ranks the"
                " same checkpoint, dtype, quantize= and store_dir="
            )

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, by rank; waits for all."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


def ranks_of_or_none(model: nn.Module) -> Ranks | None:
    """The ranks that a model's experts are split over, or None."""
    meshes: Any = getattr(model, "_mesh_manager", None)
    if meshes is None:
        return None
    return Ranks(meshes.get_mesh("ep").get_group())


def join_ranks(config: Any, device: torch.device) -> Any:
    """Check a `DistributedConfig` and join the process group that it needs.

    Args:
        config: transformers' `DistributedConfig`, or a dictionary of its fields.
        device: where the model computes.

    Returns:
        The configuration; None where it asks for a single process.

    Raises:
        ValueError: it asks for something else than expert parallelism by all-reduce, or the
            processes are not those that it needs.
        UnsupportedModelError: this transformers has no such expert parallelism.
    """
    config = _checked(config)
    if config.ep_size == 1:
        return None
    world = os.environ.get("WORLD_SIZE")
    if world != str(config.ep_size):
        raise ValueError(
            f"distributed_config asks for {config.ep_size} ranks, but "
            + ("this process was not started by torchrun" if world is None else f"{world} run")
            + f": start it with torchrun --nproc-per-node {config.ep_size}."
        )
    if device.type != torch._C._get_accelerator().type:
        raise ValueError(
            f"device={str(device)!r} cannot be combined with distributed_config here: transformers"
            f" puts a model that it splits on {torch._C._get_accelerator().type!r}."
        )
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=TIME_LIMIT,
            device_id=device if device.type == "cuda" else None,
        )
    return config


def _checked(config: Any) -> Any:
    try:
        from transformers.distributed import expert_parallel  # noqa: F401
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot split experts over ranks by"
            " all-reduce: 5.24 can."
        ) from error
    if isinstance(config, dict):
        config = DistributedConfig(**config)
    if not isinstance(config, DistributedConfig):
        raise TypeError(
            f"distributed_config={config!r} must be a DistributedConfig of transformers, or a"
            " dictionary of its fields."
        )
    others = config.dp_size * (config.pp_size or 1)
    if config.ep_size != config.tp_size or others != 1:
        raise ValueError(
            f"distributed_config has tp_size={config.tp_size}, ep_size={config.ep_size} and"
            f" {others} ranks of other kinds: specmoe splits experts over ranks that share their"
            " tokens, give DistributedConfig(tp_size=N, ep_size=N) and nothing else."
        )
    if config.ep_implementation not in _ALL_REDUCE:
        raise ValueError(
            f"ep_implementation={config.ep_implementation!r} cannot be combined with offloading:"
            f" give {' or '.join(map(repr, _ALL_REDUCE))}."
        )
    return config
