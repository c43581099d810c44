"""Compute each source layer's output with default vectors in the place of its experts.

    before                               after
    ids, w = router(r)                   ids, w = router(r)
    y = specmoe::experts(x, ids, w, l)   d = specmoe::blend_default_vectors(ids, w, x, l)
    h = r + y (+ shared)                 q = r + d (+ shared)          quasi-hidden state
                                         y = specmoe::experts(x, ids, w, l)
                                         h = r + y (+ shared)

q is a clone of h's own nodes, so that shared experts, scaling and norms after the experts are kept.
Shared experts move in front of the experts, which both sums read. For a predictor that reads no
default vectors q is r itself, and nothing is inserted.
Shape letters: T tokens, K top-k, H hidden.
"""

from __future__ import annotations

from torch.fx import Graph

from specmoe_compile.passes.fx_utils import (
    call_op,
    clone_nodes,
    context_after,
    hoist,
    specmoe_ops,
    why_not_movable,
)
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport


def insert_default_vectors(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Give every source of a path its quasi-hidden state.

    Args:
        graph: aten graph, changed in place.
        config: `predictor`.
        plan: with its paths.
    """
    report = PassReport("insert_default_vectors")
    for path in plan.paths:
        source, target = path[0], path[-1]
        if source is target or source.quasi is not None:
            continue
        if config.state != "quasi":
            source.quasi = source.residual
            continue
        reason = _insert(graph, source)
        if reason is None:
            report.matches += 1
        else:
            report.skipped[target.index] = f"its source is MoE layer {source.index}: {reason}"
    return report


def _insert(graph: Graph, layer: MoELayer) -> str | None:
    anchor = layer.experts
    assert layer.output is not None, "choose_predictions lets no such layer through"
    context = context_after(layer.update, anchor, [anchor, *layer.update])
    reason = why_not_movable(context, anchor)
    if reason is not None:
        return reason
    hoist(context, anchor)
    with graph.inserting_before(anchor):
        blend = call_op(
            graph,
            specmoe_ops().blend_default_vectors.default,
            (layer.ids, layer.weights, layer.x, layer.session, layer.index),
            like=anchor,
        )
    copies = clone_nodes(graph, layer.update, {layer.experts: blend}, anchor)
    layer.quasi = copies[layer.output]
    return None
