"""Start the prefetch of every predicted layer.

    before                               after
    pids, pw = router of l+1 (q)         pids, pw = router of l+1 (q)
    y = specmoe::experts(x, ids, w, l)   t = specmoe::start_prefetch(pids, pw, l+1)
                                         y = specmoe::experts(x, ids, w, l)

A layer that predicts itself starts its prefetch as soon as it is predicted.
Shape letters: P predicted experts per token, T tokens.
"""

from __future__ import annotations

from torch.fx import Graph

from specmoe_compile.passes.fx_utils import call_op, specmoe_ops
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.report import PassReport


def insert_expert_prefetch(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Insert one `start_prefetch` per prediction, in front of the source's experts.

    Args:
        graph: aten graph, changed in place.
        config: not read.
        plan: its layers have their predictions.
    """
    report = PassReport("insert_expert_prefetch")
    for source in plan.layers:
        for target, ids, weights in source.predictions:
            if target.ticket is not None:
                continue
            own = target is source
            place = (
                graph.inserting_after(max(ids, weights))
                if own
                else graph.inserting_before(source.experts)
            )
            with place:
                target.ticket = call_op(
                    graph,
                    specmoe_ops().start_prefetch.default,
                    (ids, weights, target.session, target.index, []),
                    like=target.experts,
                )
            source.tickets.append(target.ticket)
            report.matches += 1
    return report
