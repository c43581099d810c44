"""What must hold for a graph after every pass.

- it is well formed (`lint`) and every call that returns something carries `meta["val"]`;
- every `start_prefetch` has exactly one `wait_prefetch`, on every path, of the same layer;
- a wait precedes every use of the experts that it brought: run and correct read its state;
- no slot is refilled before its last use: between a layer's wait and its correction no prefetch of
  that layer starts, and a layer is not run in one piece and split in the same graph;
- outputs alias the same inputs as before.
- where a layer stands in branches, one speculates, and the other runs the same layer on demand and
  returns tickets that are void.

The first four are checked of the graph with every layer speculating. The session takes a layer's
branch in every step in which the layer was predicted; a ticket that met the other branch would be
settled by `experts`, as in a graph without branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

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
        if node.op == "call_function" and "val" not in node.meta and _returns(node.target):
            raise InvariantError(f"node {node.name} ({node.target}) has no fake value")
    if aliases is not None and output_aliases(graph) != aliases:
        raise InvariantError(
            f"outputs alias the inputs {output_aliases(graph)}, before the passes {aliases}"
        )
    if complete:
        flat = _speculating(graph)
        _check_tickets(flat)
        _check_states(flat)


def _returns(target: Any) -> bool:
    """Whether a call has a value; assertions of exported graphs have none."""
    schema = getattr(target, "_schema", None)
    return schema is None or bool(schema.returns)


def _layer_of(node: Node, position: int) -> tuple[Any, Any]:
    return node.args[position], node.args[position + 1]


def _check_tickets(graph: Graph) -> None:
    ops = specmoe_ops()
    started = list(find_calls(graph, ops.start_prefetch.default))
    layers = Counter(_layer_of(node, 2) for node in started)
    for (session, layer), times in layers.items():
        if times > 1:
            raise InvariantError(
                f"layer {layer} of session {session} is prefetched {times} times in one graph"
            )
    for start in started:
        # Identity of the argument: a ticket is passed on, never computed with.
        waits = [
            user
            for user in start.users
            if user.target is ops.wait_prefetch.default and user.args[0] is start
        ]
        if len(waits) != 1:
            raise InvariantError(f"{start.name} has {len(waits)} waits, expected 1")
        if _layer_of(waits[0], 2) != _layer_of(start, 2):
            raise InvariantError(f"{waits[0].name} waits for the ticket of another layer")


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
        for start in find_calls(graph, ops.start_prefetch.default):
            if _layer_of(start, 2) == layer and wait < start:
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


def _speculating(graph: Graph) -> Graph:
    """Return the graph with the first branch of every condition in its place, after a check."""
    if next(find_calls(graph, torch.ops.higher_order.cond), None) is None:
        return graph
    flat, copies = Graph(), dict[Node, Any]()
    for node in graph.nodes:
        if node.target is torch.ops.higher_order.cond:
            first, second = (_branch(graph, branch) for branch in node.args[1:3])
            _check_branches(node, first, second)
            inner = dict(zip(first.find_nodes(op="placeholder"), node.args[3], strict=True))
            inner = {placeholder: copies[operand] for placeholder, operand in inner.items()}
            for part in first.nodes:
                if part.op == "output":
                    copies[node] = [inner[out] for out in part.args[0]]
                elif part.op != "placeholder":
                    inner[part] = flat.node_copy(part, lambda n, known=inner: known[n])  # type: ignore[misc]
        elif isinstance(copies.get(node.args[0]) if node.args else None, list):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif not _is_branch(graph, node):
            copies[node] = flat.node_copy(node, lambda n: copies[n])
    return flat


def _is_branch(graph: Graph, node: Node) -> bool:
    """Whether a node names the graph of a branch; other attributes are constants."""
    return node.op == "get_attr" and isinstance(
        getattr(graph.owning_module, str(node.target), None), GraphModule
    )


def _branch(graph: Graph, node: Any) -> Graph:
    module: Any = getattr(graph.owning_module, node.target)
    branch: Graph = module.graph
    return branch


def _check_branches(condition: Node, first: Graph, second: Graph) -> None:
    ops = specmoe_ops()
    runs = [_layer_of(node, 5) for node in find_calls(first, ops.correct_experts.default)]
    demands = [_layer_of(node, 3) for node in find_calls(second, ops.experts.default)]
    if len(runs) != 1 or runs != demands:
        raise InvariantError(
            f"the branches of {condition.name} run layers {runs} and {demands}, expected one, the"
            " same"
        )
    (output,) = second.find_nodes(op="output")
    for ticket in output.args[0][1:]:
        if ticket.target is not torch.ops.aten.full.default or ticket.args[1] >= 0:
            raise InvariantError(f"a branch of {condition.name} that predicts nothing has a ticket")
