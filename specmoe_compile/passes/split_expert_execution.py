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

A layer that starts a prefetch but has none itself (the first one) is split as well, with a ticket
of -1, so that its misses are requested before the prefetch.
Shape letters: T tokens, K top-k, H hidden.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from specmoe_compile.passes.fx_utils import call_op, set_value, specmoe_ops, value_of
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport

NO_TICKET = -1


def split_expert_execution(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Split every layer that has a prefetch or starts one.

    Args:
        graph: aten graph, changed in place.
        config: not read.
        plan: its layers have their tickets.
    """
    report = PassReport("split_expert_execution")
    for layer in plan.layers:
        if layer.is_split or (layer.ticket is None and not layer.tickets):
            continue
        _split(graph, layer)
        report.matches += 1
    return report


def _split(graph: Graph, layer: MoELayer) -> None:
    ops = specmoe_ops()
    experts, x, ids, weights = layer.experts, layer.x, layer.ids, layer.weights
    where = (layer.session, layer.index)
    ticket = layer.ticket if layer.ticket is not None else _no_ticket(graph, ids)
    # As early as it can be: shared experts and the lookahead then run while misses are read.
    with graph.inserting_after(max(ticket, ids)):
        state = call_op(graph, ops.wait_prefetch.default, (ticket, ids, *where), like=experts)
    # In control mode a layer starts its own prefetch, in front of its wait.
    after = [started for started in layer.tickets if started is not layer.ticket]
    for started in after:
        started.args = (*started.args[:4], [state])
    with graph.inserting_before(experts):
        partial = call_op(
            graph,
            ops.run_resident_experts.default,
            (x, ids, weights, state, *where, after),
            like=experts,
        )
        result = call_op(
            graph,
            ops.correct_experts.default,
            (partial, x, ids, weights, state, *where),
            like=experts,
        )
    experts.replace_all_uses_with(result)
    graph.erase_node(experts)
    layer.is_split = True
    layer.parts = [state, partial, result]


def _no_ticket(graph: Graph, ids: Node) -> Node:
    with graph.inserting_after(ids):
        node = graph.call_function(
            torch.ops.aten.full.default,
            ([1], NO_TICKET),
            {"dtype": torch.int64, "device": value_of(ids).device, "pin_memory": False},
        )
        set_value(node)
    return node
