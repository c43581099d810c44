"""Tell a rank that has a slot for each of its experts where they are: in the graph, for nothing.

    y = experts(x, ids, w, s, l)   ->   slots = where(ids == E, -1, ids)
                                        y = run_own_experts(x, slots, w, s, l, counted, layers)

Such a layer plans nothing: expert e is in slot e, and E stands for other ranks' experts. Turning
that into -1 is a part of the kernel that makes `ids`, where looking the choices up by the session
is a launch of its own. The last such layer of the graph counts the uses of all of them: `counted`
are their slots, and empty elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from specmoe_compile.passes.fx_utils import call_op, find_calls, set_value, specmoe_ops, value_of
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.report import PassReport


def mask_foreign_experts(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Replace the dispatch of resident layers of a rank, in steps of one token.

    Args:
        graph: aten graph, changed in place.
        config: names the layers.
        plan: not read.
    """
    report = PassReport("mask_foreign_experts")
    foreign = dict(config.foreign_ids)
    found = [
        node
        for node in find_calls(graph, specmoe_ops().experts.default)
        if node.args[4] in foreign and _is_one_token(node.args[1])
    ]
    layers: list[Any] = [node.args[4] for node in found]
    if len(set(layers)) < len(layers):
        return report  # a layer that runs twice would be counted once
    counted: list[Node] = []
    for number, (node, layer) in enumerate(zip(found, layers, strict=True), start=1):
        x, ids, weights, session, _ = node.args
        with graph.inserting_before(node):
            counted.append(_masked(graph, ids, foreign[layer]))
            rest = (counted, layers) if number == len(found) else ([], [])
            args = (x, counted[-1], weights, session, layer, *rest)
            run = call_op(graph, specmoe_ops().run_own_experts.default, args, like=node)
        node.replace_all_uses_with(run)
        graph.erase_node(node)
        report.matches += 1
    return report


def _is_one_token(ids: Any) -> bool:
    tokens = value_of(ids).shape[0]
    return isinstance(tokens, int) and tokens == 1


def _masked(graph: Graph, ids: Any, foreign: int) -> Node:
    """`ids` with -1 in the place of the id that is foreign."""
    aten, value = torch.ops.aten, value_of(ids)
    is_foreign = call_op(graph, aten.eq.Scalar, (ids, foreign), like=ids)
    about = {"dtype": value.dtype, "device": value.device}
    nobody = graph.call_function(aten.full.default, ([], -1), about)
    set_value(nobody)
    return call_op(graph, aten.where.self, (is_foreign, nobody, ids), like=ids)
