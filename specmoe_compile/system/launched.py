"""As which of several processes this one was started: what torchrun says in the environment."""

from __future__ import annotations

import os
from typing import Any, NamedTuple


class Launched(NamedTuple):
    """This process among those that were started together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        local_size: how many are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Launched:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process where they are not set.

    Raises:
        ValueError: they are no numbers, or do not fit each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if "WORLD_SIZE" not in given:
        return Launched()
    try:
        size = int(given["WORLD_SIZE"])
        rank = int(given["RANK"]) if "RANK" in given or size > 1 else 0
        found = Launched(
            rank,
            size,
            int(given.get("LOCAL_RANK", rank)),
            int(given.get("LOCAL_WORLD_SIZE", size)),
        )
    except (KeyError, ValueError):
        found = Launched(-1)
    if not 0 <= found.rank < found.size or not 0 <= found.local_rank < found.local_size:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"The environment says {told}, which is no rank of a group of processes: start them"
            " with torchrun, or unset WORLD_SIZE."
        )
    return found


def split_of_ranks() -> dict[str, Any]:
    """Arguments of `from_pretrained` that split a model over the ranks; none in one process."""
    size = launched().size
    return {} if size == 1 else {"distributed_config": {"tp_size": size, "ep_size": size}}
