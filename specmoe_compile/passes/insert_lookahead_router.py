"""Clone a later layer's router onto the quasi-hidden state of an earlier one.

    before                               after
    q = r + d (+ shared)                 q = r + d (+ shared)
    y = specmoe::experts(x, ids, w, l)   pids, pw = router of l+1 (q)
    ...                                  y = specmoe::experts(x, ids, w, l)
    ids', w' = router of l+1 (r')        ...
                                         ids', w' = router of l+1 (r')

The clone is made of the model's own nodes, so sigmoid routers, group limits, biases and scaling
need no code of their own. With a lookahead of n the step is repeated: q becomes l+1's output with
default vectors for the predicted experts, then l+2's, and so on. With `prefetch_width` the clone's
last top-k takes more candidates.
Shape letters: T tokens, K top-k, P predicted experts per token, H hidden.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from specmoe_compile.passes.fx_utils import (
    call_op,
    clone_nodes,
    context_after,
    describe,
    hoist,
    is_call,
    is_same_value,
    nodes_between,
    same_shape,
    set_value,
    specmoe_ops,
    value_of,
    why_not_movable,
)
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport

_MAX_UPDATE_NODES = 400


def insert_lookahead_router(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Predict the target of every path; see `MoELayer.predictions` of its source.

    Args:
        graph: aten graph, changed in place.
        config: `prefetch_width`, `control`, `predictor`.
        plan: its sources have a quasi-hidden state, or are passed over. In control mode the router
            reads its true input, at the target itself.
    """
    report = PassReport("insert_lookahead_router")
    for path in plan.paths:
        source, target = path[0], path[-1]
        if config.source_of(target.index) != "router":
            continue
        if any(layer is target for layer, _, _ in source.predictions):
            continue
        state = target.residual if config.control else source.quasi
        if state is None:
            continue
        reason = _predict(graph, config, path, state)
        if reason is None:
            report.matches += 1
        else:
            report.skipped[target.index] = reason
    return report


def _predict(graph: Graph, config: PassConfig, path: Sequence[MoELayer], state: Node) -> str | None:
    source, target = path[0], path[-1]
    anchor = source.experts
    if config.state == "residual":
        path = [source, target]  # r stands for the states of all layers in between
    for layer in path[1:] or path:
        reason = _why_not(layer, target, state, anchor)
        if reason is not None:
            return reason
    for layer in path[1:-1]:
        ids, weights = _clone_router(graph, layer, state, anchor)
        state = _clone_update(graph, layer, (state, ids, weights), source)
    ids, weights = _clone_router(graph, target, state, anchor, predicting=config)
    source.predictions.append((target, ids, weights))
    return None


def _why_not(layer: MoELayer, target: MoELayer, state: Node, anchor: Node) -> str | None:
    """Why `state` cannot stand in for the layer's residual; None when it can."""
    residual, output = layer.residual, layer.output
    assert residual is not None and output is not None, "choose_predictions sees to it"
    if not same_shape(state, residual) or value_of(state).dtype != value_of(residual).dtype:
        return (
            f"its router reads {describe(residual)}, and the state to predict it from is"
            f" {describe(state)}"
        )
    inner = list(layer.router)
    if layer is not target:
        update = nodes_between([residual, layer.experts], [output])
        if len(update) > _MAX_UPDATE_NODES:
            return (
                f"the output of MoE layer {layer.index}, in between, takes {len(update)} nodes,"
                f" expected at most {_MAX_UPDATE_NODES}"
            )
        inner += update
    known = [residual, layer.experts, *inner]
    context = context_after(inner, anchor, known, wanted=[layer.ids])
    reason = why_not_movable(context, anchor)
    return None if reason is None else f"its router cannot run ahead: {reason}"


def _clone_router(
    graph: Graph,
    layer: MoELayer,
    state: Node,
    anchor: Node,
    *,
    predicting: PassConfig | None = None,
) -> tuple[Node, Node]:
    """Insert the layer's router on `state`; returns ids [T, P] and weights [T, P].

    Args:
        graph, layer, state, anchor: what to clone where.
        predicting: options, where the ids are the prediction; None for a layer in between.
    """
    assert layer.residual is not None
    known = [layer.residual, *layer.router]
    hoist(context_after(layer.router, anchor, known, wanted=[layer.ids]), anchor)
    copies = clone_nodes(graph, layer.router, {layer.residual: state}, anchor)
    # Hashed routing chooses by the token: its ids are what they are.
    ids, weights = copies.get(layer.ids, layer.ids), copies[layer.weights]
    clones = [copies[n] for n in layer.router]
    top_k = _last_top_k_or_none(ids, clones)
    if predicting is not None and predicting.prefetch_width is not None and top_k is not None:
        _widen(top_k, predicting.prefetch_width, clones)
    return ids, weights


def _last_top_k_or_none(ids: Node, clones: Sequence[Node]) -> Node | None:
    """The cloned `topk` that `ids` comes from."""
    node = ids
    while is_same_value(node):
        node = node.all_input_nodes[0]
    if not is_call(node, (operator.getitem,)):
        return None
    top_k = node.all_input_nodes[0]
    is_clone = top_k in clones and is_call(top_k, (torch.ops.aten.topk.default,))
    return top_k if is_clone else None


def _widen(top_k: Node, width: int, clones: Sequence[Node]) -> None:
    """Let a cloned top-k take `width` candidates, at most all of them."""
    assert isinstance(top_k.args[0], Node)
    candidates = value_of(top_k.args[0]).shape[-1]
    if width <= top_k.args[1]:  # type: ignore[operator]
        return
    top_k.update_arg(1, min(width, candidates))
    for clone in clones:
        if clone >= top_k:
            set_value(clone)


def _clone_update(
    graph: Graph, layer: MoELayer, step: tuple[Node, Node, Node], source: MoELayer
) -> Node:
    """Insert the layer's output for a predicted step (state, ids, weights); returns it, [.., H]."""
    state, ids, weights = step
    anchor = source.experts
    assert layer.residual is not None and layer.output is not None
    with graph.inserting_before(anchor):
        blend = call_op(
            graph,
            specmoe_ops().blend_default_vectors.default,
            (ids, weights, source.x, layer.session, layer.index),
            like=layer.experts,
        )
    replaced = {layer.residual: state, layer.experts: blend}
    inner = nodes_between(list(replaced), [layer.output])
    hoist(context_after(inner, anchor, [*replaced, *inner]), anchor)
    return clone_nodes(graph, inner, replaced, anchor)[layer.output]
