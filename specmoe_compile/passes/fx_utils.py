"""Helpers on the functional aten graph: dependences, clones, moves, metadata.

Nodes compare by position in their graph (`a < b`: a comes first), which keeps holding while nodes
are inserted and moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_aggregate

# eager_input_vals would make Inductor check a clone against the layout of the original's inputs.
_COPIED_META = ("val", "tensor_meta", "nn_module_stack")

_SAME_VALUE = frozenset(
    {
        torch.ops.aten.view.default,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.reshape.default,
        torch.ops.aten.squeeze.dim,
        torch.ops.aten.squeeze.default,
        torch.ops.aten.unsqueeze.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.alias.default,
        torch.ops.aten._to_copy.default,
        torch.ops.prims.convert_element_type.default,
    }
)
_ADDS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})
_SCALINGS = frozenset({torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar})


def is_call(node: Any, targets: Iterable[Any]) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_add(node: Node) -> bool:
    """Whether `node` adds two tensors without scaling one."""
    if not is_call(node, _ADDS) or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(argument, Node) for argument in node.args[:2])


def is_same_value(node: Node) -> bool:
    """Whether `node` is a view, a cast or a copy of its first argument."""
    if is_call(node, (torch.ops.aten.expand.default,)):
        return same_shape(node, node.all_input_nodes[0])
    return is_call(node, _SAME_VALUE)


def is_scaling(node: Node) -> bool:
    """Whether `node` is an elementwise product: a scale per channel, per token, or of all."""
    return is_call(node, _SCALINGS)


def is_mixing(node: Node) -> bool:
    """Whether `node` is a batched product of matrices, as where residual streams are mixed."""
    return is_call(node, (torch.ops.aten.bmm.default,))


def is_pure(node: Node) -> bool:
    """Whether `node` may be moved or computed twice: no mutation, effect or random number."""
    if node.op != "call_function" or node.is_impure(impure_random=False):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags or _drops_nothing(node)


def is_rank_sum(node: Node) -> bool:
    """Whether `node` is an all-reduce over the ranks, or waits for its result."""
    if not torch.distributed.is_available():
        return False
    ops = torch.ops._c10d_functional
    return is_call(node, (ops.all_reduce.default, ops.wait_tensor.default))


def _drops_nothing(node: Node) -> bool:
    """Whether `node` could draw random numbers, but only for a dropout of probability 0."""
    return bool(argument_of(node, "dropout_p") == 0.0)


def argument_of(node: Node, name: str) -> Any:
    """What a call of an operator passes by a name, or the default; None if it has no such one."""
    assert isinstance(node.target, torch._ops.OpOverload), "only operators have a schema"
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = dict(enumerate(node.args)).get(position, argument.default_value)
            return node.kwargs.get(name, given)
    return None


def value_of(node: Node) -> Any:
    """The fake value of a node (`meta["val"]`), or None."""
    return node.meta.get("val")


def same_shape(left: Node, right: Node) -> bool:
    """Whether two tensor nodes have provably the same shape."""
    a, b = value_of(left), value_of(right)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dim() != b.dim():
        return False
    return all(bool(statically_known_true(m == n)) for m, n in zip(a.shape, b.shape, strict=True))


def describe(node: Node) -> str:
    """A node for a reason string: name, shape and dtype."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return f"{node.name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return node.name


class Dependence:
    """Answers whether nodes depend on any of some source nodes, by a memoised backward walk.

    Args:
        sources: nodes that count as dependent themselves.
    """

    def __init__(self, sources: Iterable[Node]) -> None:
        self._sources = set(sources)
        self._first = min(self._sources)
        self._known: dict[Node, bool] = dict.fromkeys(self._sources, True)

    def __call__(self, node: Node) -> bool:
        """Whether `node` is, or is computed from, a source."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            # A node in front of every source cannot depend on one.
            inputs = [n for n in current.all_input_nodes if n >= self._first]
            unknown = [n for n in inputs if n not in self._known]
            if unknown:
                stack.extend(unknown)
                continue
            self._known[current] = any(self._known[n] for n in inputs)
            stack.pop()
        return self._known[node]


def nodes_between(sources: Sequence[Node], outputs: Sequence[Node]) -> list[Node]:
    """Return the nodes on paths from `sources` to `outputs`, in order, without the sources.

    Args:
        sources: nodes that the paths start at; a path through a source starts at that source.
        outputs: nodes that the paths end at, included where they depend on a source.
    """
    depends = Dependence(sources)
    found: set[Node] = set()
    stack = [n for n in outputs if depends(n)]
    while stack:
        node = stack.pop()
        if node in found or node in sources:
            continue
        found.add(node)
        stack.extend(n for n in node.all_input_nodes if depends(n))
    return sorted(found)


def context_after(
    nodes: Iterable[Node], anchor: Node, known: Iterable[Node], wanted: Iterable[Node] = ()
) -> list[Node]:
    """Return what `nodes` read that is computed after `anchor`, with all that it needs, in order.

    Args:
        nodes: nodes about to be cloned in front of `anchor`.
        anchor: where.
        known: nodes that the clones will not read (they are cloned or replaced themselves).
        wanted: nodes that are to be there themselves, unless they are known.
    """
    given = set(known)
    found: set[Node] = set()
    stack = [*wanted, *(i for n in nodes for i in n.all_input_nodes)]
    while stack:
        node = stack.pop()
        if node in given or node in found or node < anchor:
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return sorted(found)


def why_not_movable(context: Iterable[Node], anchor: Node) -> str | None:
    """Why `context` cannot be computed in front of `anchor`; None when it can."""
    for node in context:
        if node is anchor or anchor in node.all_input_nodes:
            return f"it reads {describe(node)}, which depends on these experts"
        # A functional sum over ranks may move: all ranks run the same graph.
        if not (is_pure(node) or is_rank_sum(node)) and node.op != "get_attr":
            return f"it reads {describe(node)}, which cannot be moved"
    return None


def hoist(nodes: Iterable[Node], anchor: Node) -> None:
    """Move `nodes`, in their order, to directly before `anchor`."""
    for node in nodes:
        anchor.prepend(node)


def clone_nodes(
    graph: Graph, nodes: Sequence[Node], replaced: Mapping[Node, Node], anchor: Node
) -> dict[Node, Node]:
    """Copy `nodes` to before `anchor`, reading `replaced` values instead of the originals.

    Args:
        graph: where.
        nodes: pure nodes in graph order, and sums over ranks. These are left out of the copy: what
            runs ahead never waits for another rank, and sees the share of its own experts.
        replaced: original -> substitute, for inputs of `nodes`.
        anchor: node that the copies come before.

    Returns:
        Original -> copy, with `replaced` in it.
    """
    copies = dict(replaced)
    with graph.inserting_before(anchor):
        for node in nodes:
            if is_rank_sum(node):
                (summed,) = node.all_input_nodes
                copies[node] = copies.get(summed, summed)
                continue
            copy = graph.node_copy(node, lambda n: copies.get(n, n))
            copy.meta = copied_meta(node)
            copies[node] = copy
    return copies


def copied_meta(node: Node) -> dict[str, Any]:
    """The metadata that is true of a copy of `node` as well."""
    return {key: node.meta[key] for key in _COPIED_META if key in node.meta}


def call_op(graph: Graph, op: Callable[..., Any], args: tuple[Any, ...], like: Node) -> Node:
    """Insert a call at the graph's insertion point, with its fake value.

    Args:
        graph: where.
        op: op overload.
        args: nodes, lists of nodes and constants.
        like: node whose module the call is attributed to.
    """
    node = graph.call_function(op, args)
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    set_value(node)
    return node


def set_value(node: Node) -> None:
    """Compute `meta["val"]` of a call from the fake values of its inputs."""
    target = node.target
    assert callable(target), f"{node.name} is not a call"

    def value(argument: Any) -> Any:
        return value_of(argument) if isinstance(argument, Node) else argument

    args = map_aggregate(node.args, value)
    kwargs = map_aggregate(node.kwargs, value)
    mode = detect_fake_mode([value_of(n) for n in node.all_input_nodes]) or fake_mode_of(node.graph)
    assert mode is not None, "the graph has no fake values"
    with mode, torch.no_grad():
        node.meta["val"] = target(*args, **kwargs)
    node.meta.pop("tensor_meta", None)


def fake_mode_of(graph: Graph) -> Any:
    """The fake tensor mode of a graph's placeholders, or None."""
    values = [value_of(n) for n in graph.nodes if n.op == "placeholder"]
    return detect_fake_mode(values)


def module_of(graph: Graph) -> GraphModule:
    """The graph's module, or a new one around it."""
    owner = graph.owning_module
    return owner if owner is not None else GraphModule(torch.nn.Module(), graph)


@functools.cache
def specmoe_ops() -> Any:
    """`torch.ops.specmoe`, with the ops registered."""
    import specmoe_compile.ops  # noqa: F401

    return torch.ops.specmoe


def find_calls(graph: Graph, op: Any) -> Iterator[Node]:
    """Yield the calls of an op overload, in order."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is op:
            yield node
