"""Decide whether a graph may become a CUDA graph.

A captured graph runs in memory of its own, which the next step writes over. So nothing that later
steps read may be made in it: it may change tensors that were there before (a static cache of keys
and values, at fixed addresses), and return one result, which is copied for its caller. A step that
sets up a cache, whatever its length, or one whose cache grows, returns keys and values beside its
logits, and runs as ordinary kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.passes.outline_experts import find_dispatch_nodes

_MAX_RESULTS = 1


def why_not_captured_or_none(gm: GraphModule) -> str | None:
    """Say why a Dynamo graph must not be captured; None if it may be.

    Args:
        gm: graph from Dynamo, whose nodes carry fake values.
    """
    steps = [node.args[1].meta["example_value"].shape[0] for node in find_dispatch_nodes(gm.graph)]  # type: ignore[union-attr]
    # A prefill is not worth a capture, and a length that varies would be captured once for each.
    if not all(isinstance(tokens, int) and tokens <= MAX_DECODE_TOKENS for tokens in steps):
        return f"it takes more than {MAX_DECODE_TOKENS} tokens, or a number that varies"
    made = _count_made(gm)
    if made > _MAX_RESULTS:
        return f"it makes {made} tensors that outlive it, as a cache that is set up or grows does"
    return None


def made_results(gm: GraphModule) -> frozenset[int]:
    """Which of a Dynamo graph's results lie in memory that was not there before, by index."""
    given = _given(gm)
    return frozenset(index for index, node in enumerate(_results(gm)) if _storages([node]) - given)


def _count_made(gm: GraphModule) -> int:
    """How many pieces of memory the graph returns that were not there before."""
    return len(_storages(_results(gm)) - _given(gm))


def _given(gm: GraphModule) -> set[StorageWeakRef]:
    return _storages([node for node in gm.graph.nodes if node.op == "placeholder"])


def _results(gm: GraphModule) -> list[object]:
    (output,) = gm.graph.find_nodes(op="output")
    return list(output.args[0])


def _storages(nodes: Sequence[object]) -> set[StorageWeakRef]:
    values = [node.meta.get("example_value") for node in nodes if isinstance(node, Node)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
