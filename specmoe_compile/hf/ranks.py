"""Several processes that run one model together: transformers' expert parallelism under torchrun.

transformers splits the model as its `DistributedConfig` says, and adds up the ranks' outputs of
every MoE layer. Here are the checks beforehand, what of the experts is a rank's own, that all ranks
generate from the same input and random numbers, and how a failure of one reaches the others.

Shape letters: E experts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from specmoe_compile.errors import SpecMoEError, StoreError, UnsupportedModelError
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.slice import own_experts
from specmoe_compile.system.launched import Launched, launched

TIME_LIMIT = timedelta(minutes=30)
"""How long a rank waits for the others: longer than packing or compiling takes."""
_ALL_REDUCE = ("auto", "all_reduce")


class Ranks:
    """The ranks that share a model's experts, seen from one of them.

    Attributes:
        rank: this process's, from 0.
        size: how many there are.
        on_machine: how many of them share this machine's memory.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.on_machine = min(self.size, launched().local_size)

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

    def begin_call(self, arguments: Mapping[str, Any], device: torch.device) -> None:
        """Check that all ranks generate from the same input, and give all the first one's luck.

        The state of the random numbers of `device` becomes that of rank 0, so that sampling draws
        the same tokens on every rank.

        Args:
            arguments: of `generate`, by name.
            device: where the model computes.

        Raises:
            ValueError: on all ranks, if their arguments differ.
        """
        on_gpu = device.type == "cuda"
        state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
        calls = self.gather((_described(arguments), state if self.rank == 0 else None))
        for rank, (described, _) in enumerate(calls):
            for name in sorted({*described, *calls[0][0]}):
                value, first = (words.get(name, "not given") for words in (described, calls[0][0]))
                if value != first:
                    raise ValueError(
                        f"generate() was called with other arguments on rank {rank} than on rank 0:"
                        f" {name} is {value}, and there {first}. Give all ranks the same."
                    )
        if self.rank > 0 and on_gpu:
            torch.cuda.set_rng_state(calls[0][1], device)
        elif self.rank > 0:
            torch.set_rng_state(calls[0][1])

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, by rank; waits for all.

        Raises:
            SpecMoEError: a rank has ended.
        """
        values: list[Any] = [None] * self.size
        with self.explained():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the error of a lost connection into a `SpecMoEError` that says what it means."""
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            said = str(error).splitlines()[0].partition(" This is typically")[0]
            raise SpecMoEError(
                f"Rank {self.rank} of {self.size} lost another rank: that process ended, or did not"
                f" answer for {TIME_LIMIT.total_seconds() / 60:.0f} minutes. Its own message says"
                f" why; start all ranks again. ({said})"
            ) from error


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
    world = launched().size
    if world != config.ep_size:
        raise ValueError(
            f"distributed_config asks for {config.ep_size} ranks, but "
            + ("this process was not started by torchrun" if world == 1 else f"{world} run")
            + f": start it with torchrun --nproc-per-node {config.ep_size}."
        )
    if device.type != torch._C._get_accelerator().type:
        raise ValueError(
            f"device={str(device)!r} cannot be combined with distributed_config here: transformers"
            f" puts a model that it splits on {torch._C._get_accelerator().type!r}."
        )
    if not dist.is_initialized():
        _join(device)
    return config


def join_named_group(name: str, device: torch.device) -> None:
    """Join a process group of the launched ranks that is one of several, one after the other.

    The ranks' processes that torchrun did not start itself meet under a name of their own.
    """
    here = launched()
    stores: Any = dist  # they are not in its public list
    store = stores.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and here.rank == 0,
        timeout=TIME_LIMIT,
    )
    _join(device, store=stores.PrefixStore(name, store), rank=here.rank, world_size=here.size)


def _join(device: torch.device, **where: Any) -> None:
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=TIME_LIMIT,
        device_id=device if on_gpu else None,
        **where,
    )


def device_of_rank(device: torch.device, here: Launched | None = None) -> torch.device:
    """The GPU of this rank: the one of its number on its machine, as transformers takes it.

    Args:
        device: as the caller gave it.
        here: which rank this is; by default as launched.

    Raises:
        ValueError: the caller named another GPU, or the machine has too few.
    """
    if device.type != "cuda":
        return device
    local_rank = (here or launched()).local_rank
    if device.index not in (None, local_rank):
        raise ValueError(
            f"device={str(device)!r} is not the GPU of local rank {local_rank}: give device='cuda',"
            " and each rank takes the GPU of its number."
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"Local rank {local_rank} has no GPU of its own: PyTorch sees {count} here. Start as"
            " many processes as there are GPUs."
        )
    return torch.device("cuda", local_rank)


def _described(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Arguments in words that are equal where the values are; what has no such words is left out.

    A value that is only one rank's business, such as a streamer, may differ.
    """
    words: dict[str, str] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous()
            digest = hashlib.sha256(content.flatten().view(torch.uint8).numpy().tobytes())
            words[name] = f"{list(value.shape)} with hash {digest.hexdigest()[:8]}"
        elif isinstance(value, (bool, int, float, str)):
            words[name] = repr(value)
        elif isinstance(value, Mapping):
            inner = _described(value)
            words.update({f"{name}.{key}": text for key, text in inner.items()})
        elif hasattr(value, "to_dict"):
            words.update(_described({name: value.to_dict()}))
    return words


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, kinds) or any(sign in str(error) for sign in signs)


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
