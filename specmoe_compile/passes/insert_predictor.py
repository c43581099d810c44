"""Let the session predict a layer: a trained network, or what the layer chose before.

    before                               after
    q = r + d (+ shared)                 q = r + d (+ shared)
    y = specmoe::experts(x, ids, w, l)   pids, pw = specmoe::predict_experts(q, l+1, P)
                                         y = specmoe::experts(x, ids, w, l)

A network that reads what the target's own attention reads is called where that is known:

    before                               after
    h  = ... layer l ...                 h  = ... layer l ...
    r' = h + attention(norm(h))          pids, pw = specmoe::predict_experts(h, l+1, P)
    y' = specmoe::experts(.., l+1)       r' = h + attention(norm(h))
                                         y' = specmoe::experts(.., l+1)

Shape letters: T tokens, P predicted experts per token, H hidden.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from specmoe_compile.passes.fx_utils import (
    Dependence,
    call_op,
    describe,
    is_add,
    is_same_value,
    same_shape,
    set_value,
    specmoe_ops,
    value_of,
)
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport


def insert_predictor(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Predict the target of every path that no router predicts.

    Args:
        graph: aten graph, changed in place.
        config: `predictor`, `network_layers`, `prefetch_width`, `control`.
        plan: its sources have the state to read, or are passed over.
    """
    report = PassReport("insert_predictor")
    for path in plan.paths:
        source, target = path[0], path[-1]
        kind = config.source_of(target.index)
        if kind == "router" or any(layer is target for layer, _, _ in source.predictions):
            continue
        state = source.quasi
        if source is target:
            state = attention_input_or_none(target)
            if state is None:
                assert target.residual is not None, "choose_predictions sees to it"
                report.skipped[target.index] = (
                    f"{describe(target.residual)} is no sum of its attention and what that reads"
                )
        if state is None:
            continue
        top_k = value_of(target.ids).shape[-1]
        # History has one token's experts to offer, however many are wanted.
        width = top_k if kind == "history" else max(top_k, config.prefetch_width or 0)
        _predict(graph, source, target, state, width)
        report.matches += 1
    return report


def attention_input_or_none(layer: MoELayer) -> Node | None:
    """The state that a layer's attention reads through its norm, [.., H]; None if not found.

    It is the operand of the residual's sum that the other operand is computed from.
    """
    node = layer.residual
    while node is not None and is_same_value(node):
        node = node.all_input_nodes[0]
    if node is None or not is_add(node):
        return None
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node), "is_add sees to it"
    for earlier, later in ((left, right), (right, left)):
        if earlier < later and same_shape(earlier, node) and Dependence([earlier])(later):
            return earlier
    return None


def _predict(graph: Graph, source: MoELayer, target: MoELayer, state: Node, width: int) -> None:
    own = source is target
    with graph.inserting_after(state) if own else graph.inserting_before(source.experts):
        both = call_op(
            graph,
            specmoe_ops().predict_experts.default,
            (state, target.session, target.index, width),
            like=source.experts,
        )
    taken = []
    for place in (1, 0):
        with graph.inserting_after(both):
            taken.append(graph.call_function(operator.getitem, (both, place)))
        set_value(taken[-1])
    weights, ids = taken
    source.predictions.append((target, ids, weights))
