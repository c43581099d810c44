"""Run each lookahead under a condition, so that a layer whose prefetch does not pay skips it.

    before                                     after
    s = wait_prefetch(t', ids, l)              s = wait_prefetch(t', ids, l, asks=[l+1])
    d = blend_default_vectors(ids, w, x, l)    t = cond(s & 1, lookahead, nothing, (ids, w, ...))
    q = r + d
    pids, pw = router of l+1 (q)
    t = start_prefetch(pids, pw, l+1, [s])

`lookahead` holds the prefetch and the nodes that nothing else reads; `nothing` returns a ticket of
-1. The session answers in the lowest bits of the state whether it wants the predictions that it is
asked for. On a GPU the host does not know what pays, and a captured graph has no branches: there
the graph stays as it is.

Shape letters: P predicted experts per token, T tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from specmoe_compile.passes.fx_utils import copied_meta, is_pure, set_value, value_of
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport
from specmoe_compile.passes.split_expert_execution import NO_TICKET


def guard_lookahead(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Put the lookahead of every prefetch into a branch.

    Args:
        graph: aten graph, changed in place.
        config: `conditional`; in control mode nothing is hidden, and nothing guarded.
        plan: its layers are split.
    """
    report = PassReport("guard_lookahead")
    if not config.conditional or config.control or graph.owning_module is None:
        return report
    for source in plan.layers:
        for target, _, _ in source.predictions:
            if target.ticket is None or target.ticket.target is operator.getitem:
                continue
            reason = _guard(graph, source, target)
            if reason is None:
                report.matches += 1
            else:
                report.skipped[target.index] = reason
    return report


def _guard(graph: Graph, source: MoELayer, target: MoELayer) -> str | None:
    start, owner = target.ticket, graph.owning_module
    assert start is not None and owner is not None
    after = start.args[4]
    assert isinstance(after, list) and len(after) == 1, "a prefetch comes after its source's wait"
    state = after[0]
    assert isinstance(state, Node)
    inner = [*_exclusive(start), start]
    operands = [node for node in _inputs_of(inner) if node not in inner]
    if any(not isinstance(value_of(node), torch.Tensor) for node in operands):
        return "its batch size is not fixed, and the prediction is always computed"
    branches = []
    for name, branch in (
        (f"lookahead_{target.index}", _lookahead(operands, inner)),
        (f"no_lookahead_{target.index}", _nothing(operands, start)),
    ):
        owner.register_module(name, GraphModule(torch.nn.Module(), branch, class_name=name))
        with graph.inserting_before(start):
            branches.append(graph.get_attr(name))
    with graph.inserting_before(start):
        wanted = _answer(graph, state, target.index)
        chosen = graph.call_function(
            torch.ops.higher_order.cond, (wanted, *branches, tuple(operands))
        )
        chosen.meta["val"] = (value_of(start),)
        ticket = graph.call_function(operator.getitem, (chosen, 0))
        ticket.meta["val"] = value_of(start)
    start.replace_all_uses_with(ticket)
    for node in reversed(inner):
        graph.erase_node(node)
    source.tickets = [ticket if node is start else node for node in source.tickets]
    target.ticket = ticket
    return None


def _answer(graph: Graph, state: Node, layer: int) -> Node:
    """Let the wait ask for a layer, and read its answer, bool []."""
    asks = list(state.args[4]) if len(state.args) > 4 else []  # type: ignore[arg-type]
    state.args = (*state.args[:4], [*asks, layer])
    aten = torch.ops.aten
    node = state
    for op, argument in (
        (aten.bitwise_and.Scalar, 1 << len(asks)),
        (aten.ne.Scalar, 0),
        (aten.view.default, []),
    ):
        node = graph.call_function(op, (node, argument))
        set_value(node)
    return node


def _exclusive(start: Node) -> list[Node]:
    """Return the pure nodes that only `start` reads, directly or through each other, in order."""
    found: set[Node] = set()
    stack = [node for node in start.args[:2] if isinstance(node, Node)]
    while stack:
        node = stack.pop()
        if node in found or not is_pure(node):
            continue
        if all(user is start or user in found for user in node.users):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(found)


def _inputs_of(nodes: Sequence[Node]) -> list[Node]:
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes))


def _placeholders(branch: Graph, operands: Sequence[Node]) -> dict[Node, Node]:
    copies: dict[Node, Node] = {}
    for place, operand in enumerate(operands):
        copies[operand] = branch.placeholder(f"operand_{place}")
        copies[operand].meta = copied_meta(operand)
    return copies


def _lookahead(operands: Sequence[Node], inner: Sequence[Node]) -> Graph:
    branch = Graph()
    copies = _placeholders(branch, operands)
    for node in inner:
        copies[node] = branch.node_copy(node, lambda n: copies[n])
        copies[node].meta = copied_meta(node)
    branch.output((copies[inner[-1]],))
    return branch


def _nothing(operands: Sequence[Node], start: Node) -> Graph:
    branch = Graph()
    _placeholders(branch, operands)
    value = value_of(start)
    ticket = branch.call_function(
        torch.ops.aten.full.default,
        ([1], NO_TICKET),
        {"dtype": value.dtype, "device": value.device, "pin_memory": False},
    )
    ticket.meta["val"] = value
    branch.output((ticket,))
    return branch
