"""Split expert execution into a wait, the experts that are there, and a correction.

    before                                 after
    t = start_prefetch(.., l)              t = start_prefetch(.., l)
    ...                                    ...
    ids, w = router(r)                     ids, w = router(r)
    t' = start_prefetch(.., l+1)           s  = specmoe::wait_prefetch(t, ids, l)
    y  = specmoe::experts(x, ids, w, l)    t' = start_prefetch(.., l+1, after=[s])
                                           p  = run_resident_experts(x, ids, w, s, l, after=[t'])
                                           y  = specmoe::correct_experts(p, x, ids, w, s, l)

`after` carries control edges. Without t' in the experts' arguments Inductor, which fuses the
lookahead's nodes with later ones, issues the prefetch behind the experts, where it hides nothing.
Without s in the prefetch's, the layer's own misses could queue behind it.

Where a session computes experts aside, they are issued first, and the lookahead, which begins with
the default vectors, goes on beside them:

    s  = wait_prefetch(t, ids, l)
    p  = run_resident_experts(x, ids, w, s, l, after=[])
    d  = blend_default_vectors(ids, w, x, l, after=[p])
    ...
    t' = start_prefetch(.., l+1, after=[s, p])
    y  = correct_experts(p, x, ids, w, s, l, after=[t'])

A layer that starts a prefetch but has none itself (the first one) is split as well, with a ticket
of -1, so that its misses are requested before the prefetch.
Shape letters: T tokens, K top-k, H hidden.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from specmoe_compile.passes.fx_utils import call_op, find_calls, set_value, specmoe_ops, value_of
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport

NO_TICKET = -1


def split_expert_execution(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Split every layer that has a prefetch or starts one.

    Args:
        graph: aten graph, changed in place.
        config: `experts_first`.
        plan: its layers have their tickets.
    """
    report = PassReport("split_expert_execution")
    for layer in plan.layers:
        if layer.is_split or (layer.ticket is None and not layer.tickets):
            continue
        _split(graph, layer, experts_first=config.experts_first)
        report.matches += 1
    return report


def _split(graph: Graph, layer: MoELayer, *, experts_first: bool) -> None:
    ops = specmoe_ops()
    experts, x, ids, weights = layer.experts, layer.x, layer.ids, layer.weights
    where = (layer.session, layer.index)
    ticket = layer.ticket if layer.ticket is not None else _no_ticket(graph, ids)
    # As early as it can be: shared experts and the lookahead then run while misses are read.
    with graph.inserting_after(max(ticket, ids)):
        state = call_op(graph, ops.wait_prefetch.default, (ticket, ids, *where), like=experts)
    # In control mode a layer starts its own prefetch, in front of its wait.
    after = [started for started in layer.tickets if started is not layer.ticket]
    inputs = (x, ids, weights, state)
    # A node that is put in front of the next one, since the lookahead may come right behind.
    with graph.inserting_before(max(inputs).next if experts_first else experts):
        partial = call_op(
            graph,
            ops.run_resident_experts.default,
            (*inputs, *where, [] if experts_first else after),
            like=experts,
        )
    first = [state, partial] if experts_first else [state]
    for started in after:
        started.args = (*started.args[:4], first)
    if experts_first:
        for blend in _blends(graph, layer):
            blend.args = (*blend.args[:5], [partial])
    with graph.inserting_before(experts):
        result = call_op(
            graph,
            ops.correct_experts.default,
            (partial, *inputs, *where, after if experts_first else []),
            like=experts,
        )
    experts.replace_all_uses_with(result)
    graph.erase_node(experts)
    layer.is_split = True
    layer.parts = [state, partial, result]


def _blends(graph: Graph, layer: MoELayer) -> list[Node]:
    """Return the nodes that stand in for the layer's own experts in a lookahead from it."""
    blend = specmoe_ops().blend_default_vectors.default
    return [node for node in find_calls(graph, blend) if node.args[0] is layer.ids]


def _no_ticket(graph: Graph, ids: Node) -> Node:
    with graph.inserting_after(ids):
        node = graph.call_function(
            torch.ops.aten.full.default,
            ([1], NO_TICKET),
            {"dtype": torch.int64, "device": value_of(ids).device, "pin_memory": False},
        )
        set_value(node)
    return node
