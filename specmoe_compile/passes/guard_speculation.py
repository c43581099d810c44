"""Run each layer's speculation under a condition, so that a layer that does not pay skips it.

    before                                     after
    s = wait_prefetch(t, ids, l)               b = plan_step(ids, [0, 1, ..], edges)   once per step
    d = blend_default_vectors(ids, w, x, l)    y, t' = cond(b[l], speculate, demand, (t, ids, ...))
    q = r + d
    pids, pw = router of l+1 (q)
    t' = start_prefetch(pids, pw, l+1, [s])
    p = run_resident_experts(.., s, l, [t'])
    y = correct_experts(p, x, ids, w, s, l)

`speculate` holds all of that; `demand` is `experts` alone, with a ticket of -1. In front of the
first layer the session says which layers take part in this step: those that it wants predicted, and
those that these are predicted from. On a GPU that is so where the host starts copies (transfer
`copy`) and tries what pays; a captured graph has no branches, and with `gather` the GPU tries:
there the graph stays as it is.

Shape letters: P predicted experts per token, T tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch._inductor import inductor_prims
from torch._prims_common import make_contiguous_strides_for
from torch.fx import Graph, GraphModule, Node

from specmoe_compile.passes.fx_utils import (
    call_op,
    copied_meta,
    is_call,
    is_pure,
    set_value,
    specmoe_ops,
    value_of,
)
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport
from specmoe_compile.passes.split_expert_execution import NO_TICKET

NOT_FIXED = "its batch size is not fixed: it always speculates"


def guard_speculation(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Put each split layer into a branch.

    Args:
        graph: aten graph, changed in place.
        config: `conditional`; where a layer predicts itself its prefetch starts in front of its
            attention, and nothing is guarded. `inductor`: the operands' layout is settled.
        plan: its layers are split.
    """
    report = PassReport("guard_speculation")
    if not config.conditional or graph.owning_module is None:
        return report
    if any(target is layer for layer in plan.layers for target, _, _ in layer.predictions):
        return report
    split = [layer for layer in plan.layers if layer.parts]
    for _, group in groupby(split, key=lambda layer: layer.session):
        layers = list(group)
        if any(_is_symbolic(layer.ids) for layer in layers):
            report.skipped.update((layer.index, NOT_FIXED) for layer in layers)
            continue
        wanted = _plan_step(graph, layers)
        for place, layer in enumerate(layers):
            with graph.inserting_after(wanted):
                answer = graph.call_function(torch.ops.aten.select.int, (wanted, 0, place))
            set_value(answer)
            _guard(graph, layer, answer, settle=config.lowering == "inductor")
            report.matches += 1
    return report


def _is_symbolic(node: Node) -> bool:
    return any(not isinstance(size, int) for size in value_of(node).shape)


def _plan_step(graph: Graph, layers: Sequence[MoELayer]) -> Node:
    """Insert the question, in front of the first layer's wait: bool [len(layers)]."""
    first = layers[0]
    edges: list[int] = []
    for source in layers:
        for target, _, _ in source.predictions:
            edges += [source.index, target.index]
    with graph.inserting_before(first.parts[0]):
        return call_op(
            graph,
            specmoe_ops().plan_step.default,
            (first.ids, first.session, [layer.index for layer in layers], edges),
            like=first.experts,
        )


def _guard(graph: Graph, layer: MoELayer, answer: Node, *, settle: bool) -> None:
    owner, correct = graph.owning_module, layer.parts[-1]
    assert owner is not None
    inner = _inner(layer)
    outputs = [correct, *layer.tickets]
    used = dict.fromkeys(n for node in inner for n in node.all_input_nodes)
    operands = {node: node for node in used if node not in inner}
    if settle:
        with graph.inserting_before(correct):
            operands = {node: _contiguous(node) for node in operands}
    branches = []
    for name, branch in (
        (f"speculate_{layer.index}", _speculate(operands, inner, outputs)),
        (f"demand_{layer.index}", _demand(operands, layer, outputs)),
    ):
        owner.register_module(name, GraphModule(torch.nn.Module(), branch, class_name=name))
        with graph.inserting_before(correct):
            branches.append(graph.get_attr(name))
    with graph.inserting_before(correct):
        chosen = graph.call_function(
            torch.ops.higher_order.cond, (answer, *branches, tuple(operands.values()))
        )
    chosen.meta["val"] = tuple(value_of(node) for node in outputs)
    taken: list[Node] = []
    for place, node in enumerate(outputs):
        with graph.inserting_before(correct):
            taken.append(graph.call_function(operator.getitem, (chosen, place)))
        taken[-1].meta["val"] = value_of(node)
    for node, out in zip(outputs, taken, strict=True):
        node.replace_all_uses_with(out, delete_user_cb=lambda user: user not in inner)
    for node in reversed(inner):
        graph.erase_node(node)
    for target, _, _ in layer.predictions:
        if target.ticket in layer.tickets:
            target.ticket = taken[outputs.index(target.ticket)]
    layer.tickets = taken[1:]
    layer.parts = []


def _inner(layer: MoELayer) -> list[Node]:
    """Return the parts of a layer and what nothing else reads of its lookahead, in order."""
    kept = {layer.ids, layer.weights, layer.x}
    found: set[Node] = {*layer.parts, *layer.tickets}
    stack = [n for start in layer.tickets for n in start.all_input_nodes]
    stack += [
        n for n in layer.parts[0].all_input_nodes if is_call(n, (torch.ops.aten.full.default,))
    ]
    while stack:
        node = stack.pop()
        if node in found or node in kept or not is_pure(node) or _is_branch(node):
            continue
        if all(user in found for user in node.users):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(found)


def _is_branch(node: Node) -> bool:
    """Whether a node is a condition, or a result of one."""
    cond = (torch.ops.higher_order.cond,)
    return is_call(node, cond) or (
        is_call(node, (operator.getitem,)) and is_call(node.args[0], cond)
    )


def _contiguous(node: Node) -> Node:
    """The node, made contiguous at the graph's insertion point if it is computed.

    Inductor lays out what it computes as it likes, but expects the operands of a condition with the
    strides that eager PyTorch gives them, and asserts that when the model runs. Where the layout is
    still open, this settles it, and nothing is copied. Views of inputs stay what they are.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or _views_input(node):
        return node
    settled = node.graph.call_function(
        inductor_prims.force_stride_order, (node, make_contiguous_strides_for(value.shape))
    )
    set_value(settled)
    return settled


def _views_input(node: Node) -> bool:
    while getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node.op != "call_function"


def _placeholders(branch: Graph, operands: Mapping[Node, Node]) -> dict[Node, Node]:
    copies: dict[Node, Node] = {}
    for place, (operand, passed) in enumerate(operands.items()):
        copies[operand] = branch.placeholder(f"operand_{place}")
        copies[operand].meta = copied_meta(passed)
    return copies


def _speculate(
    operands: Mapping[Node, Node], inner: Sequence[Node], outputs: Sequence[Node]
) -> Graph:
    branch = Graph()
    copies = _placeholders(branch, operands)
    strides_differ = any(
        value_of(operand).stride() != value_of(passed).stride()
        for operand, passed in operands.items()
        if operand is not passed
    )
    for node in inner:
        copies[node] = branch.node_copy(node, lambda n: copies[n])
        copies[node].meta = copied_meta(node)
        if strides_differ and copies[node].all_input_nodes:
            set_value(copies[node])
    branch.output(tuple(copies[node] for node in outputs))
    return branch


def _demand(operands: Mapping[Node, Node], layer: MoELayer, outputs: Sequence[Node]) -> Graph:
    branch = Graph()
    copies = _placeholders(branch, operands)
    made = [
        branch.call_function(
            specmoe_ops().experts.default,
            (
                *(copies[node] for node in (layer.x, layer.ids, layer.weights)),
                layer.session,
                layer.index,
            ),
        )
    ]
    for ticket in outputs[1:]:
        value = value_of(ticket)
        made.append(
            branch.call_function(
                torch.ops.aten.full.default,
                ([1], NO_TICKET),
                {"dtype": value.dtype, "device": value.device, "pin_memory": False},
            )
        )
    for node, output in zip(made, outputs, strict=True):
        node.meta["val"] = value_of(output)
    branch.output(tuple(made))
    return branch
