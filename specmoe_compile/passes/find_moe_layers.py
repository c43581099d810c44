"""Find the MoE layers of an aten graph: dispatch node, router, residual stream, add after it.

Finds, changes nothing:

    r  = residual                      read by the router and by the add after the experts
    x, ids, w = norm, router (r)       `router`: the nodes from r to ids and w
    y  = specmoe::experts(x, ids, w)
    h  = r + y (+ shared experts)      `update`: the nodes from y to h

r is told from every other addend (shared experts, attention beside the experts) by what it feeds:
it is the one that the router's weights are computed from, and but for hashed routing its choice.
Shape letters: T tokens, K top-k, H hidden.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from torch import Tensor
from torch.fx import Graph, Node

from specmoe_compile.passes.fx_utils import (
    Dependence,
    describe,
    find_calls,
    is_add,
    is_mixing,
    is_pure,
    is_rank_sum,
    is_same_value,
    is_scaling,
    nodes_between,
    same_shape,
    specmoe_ops,
    value_of,
)
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport

_MAX_ROUTER_NODES = 400
_MAX_ADD_DEPTH = 4


def find_moe_layers(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Fill in `plan.layers`; those that are not understood carry a reason."""
    report = PassReport("find_moe_layers")
    layers = [_layer(node) for node in find_calls(graph, specmoe_ops().experts.default)]
    calls = Counter((layer.session, layer.index) for layer in layers)
    for layer in layers:
        times = calls[(layer.session, layer.index)]
        if times > 1:
            layer.reason = f"it runs {times} times in this graph"
        else:
            layer.reason = _find_residual(layer) or _find_router(layer)
        if layer.reason is not None:
            layer.residual = layer.output = None
            layer.router, layer.update = [], []
            report.skipped[layer.index] = layer.reason
        else:
            report.matches += 1
    plan.layers = layers
    return report


def _layer(node: Node) -> MoELayer:
    x, ids, weights, session, index = node.args[:5]
    assert isinstance(session, int) and isinstance(index, int), "handles are constants"
    assert isinstance(x, Node) and isinstance(ids, Node) and isinstance(weights, Node)
    return MoELayer(experts=node, x=x, ids=ids, weights=weights, session=session, index=index)


def _find_residual(layer: MoELayer) -> str | None:
    """Fill in `residual`, `output` and `update`; returns why not."""
    for node, others in _downstream_adds(layer.experts):
        residual = _residual_among(others, layer)
        if residual is not None:
            layer.residual = residual
            layer.output = _end_of_sum(node)
            layer.update = nodes_between([layer.experts], [layer.output])
            break
    else:
        return (
            "no addition after its experts has an operand that its router reads: no residual stream"
        )
    for node in layer.update:
        if not (is_pure(node) or is_rank_sum(node)):
            return f"the addition after its experts passes through {describe(node)}"
    return None


def _downstream_adds(experts: Node) -> Iterator[tuple[Node, list[Node]]]:
    """Yield additions that the experts' output flows into, first ones first.

    Each comes with its operands that do not depend on the experts. The walk ends at the next
    dispatch node, and follows nothing behind an addition to a residual (the caller stops there).
    """
    seen = {experts}
    heap = sorted(experts.users)
    queued = set(heap)
    while heap:
        node = heapq.heappop(heap)
        if node.op != "call_function" or node.target is experts.target:
            return
        if is_add(node):
            others = [n for n in node.all_input_nodes if n not in seen]
            if others and same_shape(node, others[0]):
                yield node, others
        seen.add(node)
        for user in node.users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(heap, user)


def _residual_among(operands: list[Node], layer: MoELayer) -> Node | None:
    """The operand, or the term of a sum that is an operand, that the router reads.

    Some models scale and shift the residual in front of the addition, h = (r + b) * s + y; others
    have several residual streams and mix them, h = C @ r + p * y (hyper-connections).
    """
    terms = [(node, 0) for node in operands]
    while terms:
        node, depth = terms.pop(0)
        if node < layer.experts and _feeds_router(node, layer):
            return node
        if depth < _MAX_ADD_DEPTH and (is_add(node) or is_scaling(node) or is_same_value(node)):
            terms += [(n, depth + 1) for n in node.all_input_nodes]
        elif is_mixing(node):
            mixed = map(_without_views, node.all_input_nodes)
            # A sum, as residuals are: attention beside the experts is a product as well.
            terms += [
                (n, _MAX_ADD_DEPTH) for n in mixed if is_add(n) and same_shape(n, operands[0])
            ]
    return None


def _without_views(node: Node) -> Node:
    """What `node` is a view, a cast or a copy of."""
    while is_same_value(node):
        node = node.all_input_nodes[0]
    return node


def _feeds_router(node: Node, layer: MoELayer) -> bool:
    # The size of a batch that is not fixed feeds everything, but is no residual.
    if node is layer.ids or node is layer.weights or not isinstance(value_of(node), Tensor):
        return False
    depends = Dependence([node])
    # Hashed routing chooses by the token alone, and weighs by the stream.
    return depends(layer.x) and depends(layer.weights)


def _end_of_sum(node: Node) -> Node:
    """Follow a value that only one more addition, view or cast reads: (r + y) + attention."""
    while len(node.users) == 1:
        (user,) = node.users
        if not (is_add(user) or is_same_value(user)) or user.all_input_nodes.count(node) != 1:
            break
        if is_add(user):
            (other,) = (n for n in user.all_input_nodes if n is not node)
            if other > node and Dependence([node])(other):
                break
        node = user
    return node


def _find_router(layer: MoELayer) -> str | None:
    """Fill in `router`; returns why not."""
    assert layer.residual is not None
    layer.router = nodes_between([layer.residual], [layer.ids, layer.weights])
    if len(layer.router) > _MAX_ROUTER_NODES:
        return (
            f"{len(layer.router)} nodes lie between {describe(layer.residual)} and its router's"
            f" choice, expected at most {_MAX_ROUTER_NODES}"
        )
    for node in layer.router:
        if not is_pure(node):
            return f"its router's choice passes through {describe(node)}"
        if node.target is layer.experts.target:
            return f"its router's choice depends on other experts ({node.name})"
    if value_of(layer.ids) is None or value_of(layer.residual) is None:
        return "its nodes have no fake values"
    return None
