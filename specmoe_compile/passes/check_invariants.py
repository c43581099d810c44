"""What must hold for a graph after every pass.

- it is well formed (`lint`) and every call carries `meta["val"]`;
- every `start_prefetch` has exactly one `wait_prefetch`, on every path, of the same layer; where it
  stands in a branch, the ticket leaves the branch, and the other branch returns one that is void;
- a wait precedes every use of the experts that it brought: run and correct read its state;
- no slot is refilled before its last use: between a layer's wait and its correction no prefetch of
  that layer starts, and a layer is not run in one piece and split in the same graph;
- outputs alias the same inputs as before.

Only prefetches stand in branches, so "on every path" is "once in the graph" for all else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from specmoe_compile.errors import InvariantError
from specmoe_compile.passes.fx_utils import find_calls, specmoe_ops


def output_aliases(graph: Graph) -> list[str | None]:
    """For each tensor output, the input that it is a view of, or None."""
    (output,) = graph.find_nodes(op="output")
    return [_root(node) for node in output.all_input_nodes]


def _root(node: Node) -> str | None:
    while node.op == "call_function":
        target: Any = node.target
        if not getattr(target, "is_view", False):
            return None
        node = node.all_input_nodes[0]
    return node.name


def check_invariants(
    graph: Graph, aliases: list[str | None] | None = None, *, complete: bool = True
) -> None:
    """Raise if the graph breaks an invariant.

    Args:
        graph: aten graph.
        aliases: `output_aliases` of the graph before the passes.
        complete: all passes have run; until then a prefetch has no wait.

    Raises:
        InvariantError: names the pass's mistake; it is a bug of specmoe.
    """
    graph.lint()
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            raise InvariantError(f"node {node.name} ({node.target}) has no fake value")
    if aliases is not None and output_aliases(graph) != aliases:
        raise InvariantError(
            f"outputs alias the inputs {output_aliases(graph)}, before the passes {aliases}"
        )
    if complete:
        _check_tickets(graph)
        _check_states(graph)


def _layer_of(node: Node, position: int) -> tuple[Any, Any]:
    return node.args[position], node.args[position + 1]


def _check_tickets(graph: Graph) -> None:
    ops = specmoe_ops()
    started = _tickets(graph)
    layers = Counter(_layer_of(start, 2) for start in started.values())
    for (session, layer), times in layers.items():
        if times > 1:
            raise InvariantError(
                f"layer {layer} of session {session} is prefetched {times} times in one graph"
            )
    for ticket, start in started.items():
        # Identity of the argument: a ticket is passed on, never computed with.
        waits = [
            user
            for user in ticket.users
            if user.target is ops.wait_prefetch.default and user.args[0] is ticket
        ]
        if len(waits) != 1:
            raise InvariantError(f"{start.name} has {len(waits)} waits, expected 1")
        if _layer_of(waits[0], 2) != _layer_of(start, 2):
            raise InvariantError(f"{waits[0].name} waits for the ticket of another layer")


def _tickets(graph: Graph) -> dict[Node, Node]:
    """Each ticket in the graph with the `start_prefetch` that it comes from, in a branch or not."""
    start_op = specmoe_ops().start_prefetch.default
    found = {node: node for node in find_calls(graph, start_op)}
    for condition in find_calls(graph, torch.ops.higher_order.cond):
        branches = [_branch(graph, node) for node in condition.args[1:3]]
        starts = [list(find_calls(branch, start_op)) for branch in branches]
        if not any(starts):
            continue
        if [len(s) for s in starts] != [1, 0]:
            raise InvariantError(f"{condition.name} prefetches in {starts}, expected one branch")
        (output,) = branches[0].find_nodes(op="output")
        if output.args[0] != (starts[0][0],) or len(condition.users) != 1:
            raise InvariantError(f"the ticket of {starts[0][0].name} does not leave its branch")
        found[next(iter(condition.users))] = starts[0][0]
    return found


def _branch(graph: Graph, node: Any) -> Graph:
    module: Any = getattr(graph.owning_module, node.target)
    branch: Graph = module.graph
    return branch


def _check_states(graph: Graph) -> None:
    ops = specmoe_ops()
    split: set[tuple[Any, Any]] = set()
    for wait in find_calls(graph, ops.wait_prefetch.default):
        layer = _layer_of(wait, 2)
        if layer in split:
            raise InvariantError(f"layer {layer[1]} of session {layer[0]} has two waits")
        split.add(layer)
        run = _only_user(wait, ops.run_resident_experts.default, lambda n: _layer_of(n, 4))
        correct = _only_user(wait, ops.correct_experts.default, lambda n: _layer_of(n, 5))
        if correct.args[0] is not run:
            raise InvariantError(f"{correct.name} does not correct {run.name}")
        for ticket, start in _tickets(graph).items():
            if _layer_of(start, 2) == layer and wait < ticket:
                raise InvariantError(f"{start.name} refills slots that {run.name} still reads")
    for name in ("run_resident_experts", "correct_experts"):
        op, position = getattr(ops, name).default, 3 if name == "run_resident_experts" else 4
        for node in find_calls(graph, op):
            state = node.args[position]
            if not isinstance(state, Node) or state.target is not ops.wait_prefetch.default:
                raise InvariantError(f"{node.name} runs without waiting")
    for node in find_calls(graph, ops.experts.default):
        if _layer_of(node, 3) in split:
            raise InvariantError(f"{node.name} runs a layer that is also split")


def _only_user(wait: Node, op: Any, layer_of: Callable[[Node], tuple[Any, Any]]) -> Node:
    users = [n for n in wait.users if n.target is op]
    if len(users) != 1 or layer_of(users[0]) != _layer_of(wait, 2):
        raise InvariantError(
            f"{wait.name} has {len(users)} {op.name()} of its layer, expected exactly one"
        )
    return users[0]
