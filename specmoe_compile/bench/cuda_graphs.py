"""CUDA graphs by default, for the commands that decode on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def with_cuda_graphs(
    options: Mapping[str, Any], *, device: torch.device, store: str, kv_cache: str
) -> dict[str, Any]:
    """Add `mode="reduce-overhead"` where decode steps can be CUDA graphs and nobody said otherwise.

    Without them the host's launches are most of a token (docs/results/log/full_size.md).

    Args:
        options: of `torch.compile(backend="specmoe")`; a `mode`, transfer `copy` or lowering
            `eager` among them is left as it is.
        device: where the model computes.
        store: where its experts are, "ram" or "disk"; those on disk no graph can fetch.
        kv_cache: "static" or "dynamic"; with the latter each step has other shapes.
    """
    possible = device.type == "cuda" and store == "ram" and kv_cache == "static"
    decided = (
        "mode" in options or options.get("transfer") == "copy" or options.get("lowering") == "eager"
    )
    return {**options, "mode": "reduce-overhead"} if possible and not decided else dict(options)
