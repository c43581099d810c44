"""Opening the inboxes of a process group: memory of each rank's GPU that all others can write.

All ranks of a group do this together, once, and all get the same answer: sums over ranks are in
their graphs either so or by all-reduce.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from specmoe_compile.kernels.sum_ranks.inbox import (
    MAX_RANKS,
    letter_count,
    make_inbox,
    use_inbox,
)

_decided: dict[str, tuple[Any, str | None]] = {}
"""By name: the group that it was, and why it has no inbox."""


def open_inboxes(
    names: Iterable[str], device: torch.device, most_ranks: int | None = None
) -> Mapping[str, str | None]:
    """Open the inboxes of process groups, unless they are; all of their ranks must ask.

    Waits for the other ranks and for the GPU.

    Args:
        names: of the groups.
        device: of this rank.
        most_ranks: larger groups get none; None for no such bound.

    Returns:
        By name why a group has none, the same on all its ranks; None where it has.
    """
    c10d: Any = dist.distributed_c10d
    reasons: dict[str, str | None] = {}
    for name in names:
        group = c10d._resolve_process_group(name)
        if most_ranks is not None and group.size() > most_ranks:
            reasons[name] = (
                f"it has {group.size()} ranks, and more than {most_ranks} were not tried"
            )
            continue
        known, _ = _decided.get(name, (None, None))
        if known is not group:  # else another group had that name before
            _decided[name] = group, _open(name, group, device)
        reasons[name] = _decided[name][1]
    return reasons


def _open(name: str, group: Any, device: torch.device) -> str | None:
    """Open one; why not, or None."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    with torch.cuda.device(device):
        told = _gather((_why_not_here(group), socket.gethostname(), _uuid(device)), group)
        reason = _first([why for why, _, _ in told])
        if reason is None and len({host for _, host, _ in told}) > 1:
            reason = "its ranks are on several machines"
        if reason is not None:
            return reason
        unreachable = _unreachable(device, [uuid for _, _, uuid in told])
        if reason := _first(_gather(unreachable, group)):
            return reason
        return _first(_gather(_share(name, group, device), group))


def _why_not_here(group: Any) -> str | None:
    if not 1 < group.size() <= MAX_RANKS:
        return f"it has {group.size()} ranks, expected 2 to {MAX_RANKS}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    memory = _symmetric_memory_or_none()
    if memory is None or not (hasattr(memory, "empty") and hasattr(memory, "rendezvous")):
        return f"PyTorch {torch.__version__} has no symmetric memory"
    return None


def _symmetric_memory_or_none() -> Any:
    try:
        import torch.distributed._symmetric_memory as memory
    except ImportError:
        return None
    return memory


def _uuid(device: torch.device) -> str:
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def _unreachable(device: torch.device, uuids: list[str]) -> str | None:
    """Why the other ranks' GPUs cannot be written from here, as far as this process sees them."""
    here = _uuid(device)
    for index in range(torch.cuda.device_count()):
        other = _uuid(torch.device("cuda", index))
        if other == here or other not in uuids:
            continue
        if not torch.cuda.can_device_access_peer(device, index):
            return f"{device} cannot reach the memory of cuda:{index}"
    return None


def _share(name: str, group: Any, device: torch.device) -> str | None:
    """Allocate and exchange the letters; why that failed, or None."""
    memory = _symmetric_memory_or_none()
    size, rank = group.size(), group.rank()
    try:
        letters = memory.empty(letter_count(size), dtype=torch.int64, device=device)
        handle = memory.rendezvous(letters, group)
        theirs = [letters if r == rank else _letters_of(handle, r, letters) for r in range(size)]
        addresses = [each.data_ptr() for each in theirs]
        inbox = make_inbox(rank, letters, addresses, kept=(handle, theirs))
        torch.cuda.synchronize(device)  # the zeros are there before a rank is told that they are
    except RuntimeError as error:
        said = str(error).strip().splitlines() or ["no message"]
        return f"rank {rank} could not share memory: {said[0]}"
    use_inbox(name, inbox)
    return None


def _letters_of(handle: Any, rank: int, like: torch.Tensor) -> torch.Tensor:
    """Another rank's letters, as this rank's GPU reaches them."""
    if hasattr(handle, "get_remote_tensor"):
        theirs: torch.Tensor = handle.get_remote_tensor(rank, like.shape, like.dtype)
        return theirs
    there: torch.Tensor = handle.get_buffer(rank, like.shape, like.dtype)
    return there


def _gather(value: Any, group: Any) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
