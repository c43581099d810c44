"""Equal layers of a decode step become calls of one subgraph, which Inductor compiles once.

Works on the functional aten graph when all other passes are done (`post_grad_custom_post_pass`).

    before                                     after
    r1, x1, ids1, w1 = (nodes of layer 1)      r1, x1, ids1, w1 = layer(y0, r0, weights of 1)
    y1 = experts(x1, ids1, w1, 1)              y1 = experts(x1, ids1, w1, 1)
    r2, x2, ids2, w2 = (nodes of layer 2)      r2, x2, ids2, w2 = layer(y1, r1, weights of 2)

The ops that name a MoE layer stay where they are, and cut the graph into regions: nothing is fused
across them anyway. Regions that are the same but for what comes in are one subgraph. What a region
writes into its inputs (a cache of keys and values) it writes inside; `specmoe::written` tells
Inductor so. Views are made again where they are used, so that what goes in and out has memory of
its own.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import inductor_prims
from torch._inductor.utils import tensor_is_aligned
from torch.fx import Graph, GraphModule, Node

from specmoe_compile.passes.fx_utils import is_call, is_pure, module_of
from specmoe_compile.passes.report import PassReport

log = logging.getLogger(__name__)

MIN_NODES = 12
"""Regions with fewer calls are compiled as fast as they are called."""

_FREE_OPS = frozenset(
    {
        "specmoe::products",
        "specmoe_kernels::products",
        "specmoe_kernels::decode_attention",
        "specmoe_kernels::attended_range",
        "specmoe_kernels::top_k",
        "specmoe_kernels::sum_ranks",
    }
)
"""Ops of this package that name no layer: what they do depends on their tensors alone."""
_COPY = torch.ops.aten.copy_.default
_NO_COPIES = (
    torch.ops.aten.reshape.default,
    inductor_prims.force_stride_order,
)
"""Which may return the memory of what they are given."""


@dataclass(slots=True, eq=False)
class Region:
    """Calls between the same experts, in order, and what crosses its border."""

    nodes: list[Node]
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    written: list[Node] = field(default_factory=list)
    """Inputs of the graph that it writes, and nobody else reads."""


def share_layers(graph: Graph) -> PassReport:
    """Outline regions that a graph has more than once, in place."""
    report = PassReport("share_layers")
    if any(_has_open_shape(node.meta.get("val")) for node in graph.nodes):
        log.debug("share_layers: shapes are open")
        return report
    depth = _cut(graph)
    _make_views_where_used(graph, depth)
    groups: dict[Any, list[Region]] = {}
    for region in _regions(graph, depth):
        if len(region.nodes) >= MIN_NODES and _bound(region):
            groups.setdefault(_form(region), []).append(region)
    shared = [group for group in groups.values() if len(group) > 1]
    for number, same in enumerate(shared):
        module_of(graph).add_submodule(f"shared_layer_{number}", _subgraph(same[0]))
    made: dict[Node, Node] = {}
    for number, same in enumerate(shared):
        for region in same:
            _call(graph, f"shared_layer_{number}", region, made)
        report.matches += len(same)
    _tell_of_writes(graph, [node for same in shared for region in same for node in region.written])
    return report


def _has_open_shape(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    return isinstance(value, list | tuple) and any(map(_has_open_shape, value))


def _is_barrier(node: Node) -> bool:
    """Whether a call stays where it is: it names a layer, or does more than return tensors."""
    if node.op != "call_function" or node.target is _COPY:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
        if name.startswith("specmoe"):
            return name not in _FREE_OPS
        return node.target._schema.is_mutable or not is_pure(node)
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _cut(graph: Graph) -> dict[Node, int]:
    """Number each call that may be outlined by the most barriers on a way to it.

    What depends on no barrier belongs where it is used, if that is one region.
    """
    depth: dict[Node, int] = {}
    behind: dict[Node, int] = {}
    for node in graph.nodes:
        deepest = max((behind[source] for source in node.all_input_nodes), default=0)
        is_barrier = _is_barrier(node)
        behind[node] = deepest + is_barrier
        # Parts of what a barrier returns stay with it.
        stays = is_barrier or (_is_getitem(node) and _is_barrier(node.all_input_nodes[0]))
        if node.op == "call_function" and not stays:
            depth[node] = deepest
    for node in reversed(graph.nodes):
        if depth.get(node) == 0 and node.users:
            used_in = {depth.get(user, -1) for user in node.users}
            if len(used_in) == 1 and -1 not in used_in:
                depth[node] = used_in.pop()
    for node in graph.nodes:
        if node.target is _COPY:
            _place_write(node, depth)
    return depth


def _place_write(copy: Node, depth: dict[Node, int]) -> None:
    """A write into an input belongs where its value is made, or where that input is read."""
    depth.pop(copy, None)
    target, source = copy.args[:2]
    if not isinstance(source, Node) or not isinstance(target, Node) or source not in depth:
        return
    read_in = {depth.get(user, -1) for user in target.users if user not in (copy, source)}
    if depth[source] == 0 and len(source.users) == 1 and len(read_in) == 1 and -1 not in read_in:
        depth[source] = read_in.pop()
    depth[copy] = depth[source]


def _is_getitem(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _is_view(node: Node) -> bool:
    if _is_getitem(node):
        return _is_view(node.all_input_nodes[0])
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return bool(target.is_view) or is_call(node, _NO_COPIES)


def _make_views_where_used(graph: Graph, depth: dict[Node, int]) -> None:
    """Repeat views of other regions' tensors, so that no view crosses a border."""
    for node in reversed(graph.nodes):
        if not _is_view(node):
            continue
        own = depth.get(node)
        others: dict[int | None, list[Node]] = {}
        for user in node.users:
            if depth.get(user) != own:
                others.setdefault(depth.get(user), []).append(user)
        for region, users in others.items():
            with graph.inserting_before(min(users)):
                again = graph.node_copy(node)
            again.meta = dict(node.meta)
            if region is not None:
                depth[again] = region
            for user in users:
                user.replace_input_with(node, again)
        if not node.users:
            depth.pop(node, None)
            graph.erase_node(node)


def _regions(graph: Graph, depth: Mapping[Node, int]) -> Iterable[Region]:
    """All regions, with their calls in the order of the graph, writes last."""
    found: dict[int, Region] = {}
    for node in graph.nodes:
        if node in depth:
            found.setdefault(depth[node], Region([])).nodes.append(node)
    return found.values()


def _bound(region: Region) -> bool:
    """Find what crosses a region's border; whether it can be outlined."""
    inside = set(region.nodes)
    seen: dict[Node, None] = {}
    for node in region.nodes:
        seen.update((source, None) for source in node.all_input_nodes if source not in inside)
        if node.target is _COPY:
            target = node.args[0]
            if not isinstance(target, Node) or node.users or not set(target.users) <= inside:
                return False
            region.written.append(target)
        elif any(user not in inside for user in node.users):
            region.outputs.append(node)
    region.inputs = list(seen)
    if any(user.target is _COPY for node in region.outputs for user in node.users):
        return False  # a whole cache would be handed out: to be copied, or as it is
    crossing = (*region.inputs, *region.outputs)
    return bool(region.outputs) and all(
        isinstance(node.meta.get("val"), torch.Tensor) for node in crossing
    )


def _form(region: Region) -> Any:
    """What two regions have in common that are the same but for what comes in.

    Inductor's kernels for a GPU rely on the alignment of the inputs that they were made for.
    """
    inside = {node: number for number, node in enumerate(region.nodes)}
    outside = {node: number for number, node in enumerate(region.inputs)}

    def frozen(value: Any) -> Any:
        if isinstance(value, Node):
            return ("node", inside[value]) if value in inside else ("input", outside[value])
        if isinstance(value, list | tuple):
            return tuple(frozen(each) for each in value)
        if isinstance(value, dict):
            return tuple((name, frozen(each)) for name, each in value.items())
        return type(value).__name__, repr(value)

    calls = tuple(
        (node.target, frozen(node.args), frozen(node.kwargs), _layout(node.meta.get("val")))
        for node in region.nodes
    )
    comes_in = tuple(
        (_layout(node.meta["val"]), tensor_is_aligned(node.meta["val"])) for node in region.inputs
    )
    return calls, comes_in, tuple(inside[node] for node in region.outputs)


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, tuple(value.shape), value.stride()
    if isinstance(value, list | tuple):
        return tuple(_layout(each) for each in value)
    return type(value).__name__


def _subgraph(region: Region) -> GraphModule:
    """A region as a graph of its own, which writes in place what can be written so."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for number, node in enumerate(region.inputs):
        copies[node] = graph.placeholder(f"arg{number}_1")
        copies[node].meta = {"val": node.meta["val"]}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    output = graph.output(tuple(copies[node] for node in region.outputs))
    output.meta = {"val": tuple(node.meta["val"] for node in region.outputs)}
    module = GraphModule(torch.nn.Module(), graph)
    _write_in_place(module)
    module.recompile()
    return module


def _write_in_place(module: GraphModule) -> None:
    """What Inductor does with a graph after its custom passes; subgraphs had their turn before."""
    from torch._inductor.fx_passes import post_grad, reinplace

    updater: Any = _NothingNew()
    reinplace.reinplace_inplaceable_ops(updater, module.graph)
    post_grad.decompose_auto_functionalized(module.graph)


class _NothingNew:
    """Stands for Inductor's updater of fake values: all nodes have theirs."""

    def incremental_update(self) -> None:
        """Update nothing."""


def _call(graph: Graph, name: str, region: Region, made: dict[Node, Node]) -> None:
    """Put a call in a region's place; Inductor sorts the graph afterwards.

    Args:
        made: what stands now for nodes of regions that were replaced; added to.
    """
    inputs = [made.get(node, node) for node in region.inputs]
    values = tuple(node.meta["val"] for node in region.outputs)
    # In front of what others write at the graph's end, which the region may read.
    with graph.inserting_after(max(node for node in region.nodes if node.target is not _COPY)):
        subgraph = graph.get_attr(name)
    with graph.inserting_after(subgraph):
        call = graph.call_function(
            torch.ops.higher_order.invoke_subgraph, (subgraph, name, *inputs)
        )
    call.meta = {"val": values}
    after = call
    for number, node in enumerate(region.outputs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, number))
        after.meta = dict(node.meta)
        node.replace_all_uses_with(after)
        made[node] = after
    for node in reversed(region.nodes):
        graph.erase_node(node)


def _tell_of_writes(graph: Graph, written: Sequence[Node]) -> None:
    if not written:
        return
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        call = graph.call_function(
            torch.ops.specmoe.written.default, (list(dict.fromkeys(written)),)
        )
    call.meta = {"val": None}
