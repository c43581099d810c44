"""CUDA graphs by default, for the commands that decode on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def with_cuda_graphs(
    options: Mapping[str, Any], *, device: torch.device, store: str | None, kv_cache: str
) -> dict[str, Any]:
    """Add `mode="reduce-overhead"` where decode steps can be CUDA graphs and nobody said otherwise.

    Without them the host's launches are most of a token (docs/results/log/full_size.md).

    Args:
        options: of `torch.compile(backend="specmoe")`; a `mode`, transfer `copy` or lowering
            `eager` among them is left as it is.
        device: where the model computes.
        store: where missing experts come from, see `fetched_from`; from disk no graph can fetch.
        kv_cache: "static" or "dynamic"; with the latter each step has other shapes.
    """
    possible = device.type == "cuda" and store != "disk" and kv_cache == "static"
    decided = (
        "mode" in options or options.get("transfer") == "copy" or options.get("lowering") == "eager"
    )
    return {**options, "mode": "reduce-overhead"} if possible and not decided else dict(options)


def fetched_from(model: torch.nn.Module) -> str | None:
    """Where an offloaded model's missing experts come from: "ram", "disk", None if none is ever.

    On a GPU a layer with a slot for every expert is filled once.
    """
    from specmoe_compile.hf.attach import session_of

    session = session_of(model)
    return session.stats.store if session.engine.fetches else None
