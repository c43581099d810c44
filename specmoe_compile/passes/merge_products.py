"""Let the CPU engine multiply in a decode step: one call for all weights of an input.

    q = aten::mm(x, permute(wq))         q, k, v = specmoe::products(x, [wq, wk, wv], [], s)
    k = aten::mm(x, permute(wk))    ->
    v = aten::mm(x, permute(wv))

PyTorch's own products take some 30 us each, however small, and share large ones by OpenMP,
whose threads keep spinning on the cores that the engine's threads compute experts on.

Shape letters: T tokens, N outputs, I inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.passes.fx_utils import (
    call_op,
    find_calls,
    is_call,
    set_value,
    specmoe_ops,
    value_of,
)
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.report import PassReport

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRANSPOSES = (torch.ops.aten.permute.default, torch.ops.aten.t.default)
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class _Product(NamedTuple):
    """`node` = x [T, I] times weight [N, I] transposed, plus bias [N] if there is one."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None


def merge_products(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Replace products of at most 16 tokens with parameters, all those of one input at once.

    Args:
        graph: aten graph, changed in place.
        config: says whether the sessions' engine multiplies.
        plan: not read.
    """
    report = PassReport("merge_products")
    dispatch = _first_dispatch(graph)
    if not config.multiplies or dispatch is None:
        return report
    groups: dict[tuple[Any, ...], list[_Product]] = {}
    for node in graph.nodes:
        product = _product_or_none(node)
        if product is not None:
            key = (_source(product.x), product.bias is None)
            groups.setdefault(key, []).append(product)
    for products in groups.values():
        _replace(graph, products, dispatch.args[-2])
        report.matches += len(products)
    return report


def _first_dispatch(graph: Graph) -> Node | None:
    """A call of an expert layer, whose last arguments are session and layer."""
    ops = specmoe_ops()
    for op in (ops.experts.default, ops.correct_experts.default):
        for node in find_calls(graph, op):
            return node
    return None


def _product_or_none(node: Node) -> _Product | None:
    """Read a node as a product that the engine takes."""
    bias: Any = None
    if is_call(node, (torch.ops.aten.mm.default,)) and not node.kwargs:
        x, transposed = node.args
    elif is_call(node, (torch.ops.aten.addmm.default,)) and not node.kwargs:
        bias, x, transposed = node.args
    else:
        return None
    if not is_call(transposed, _TRANSPOSES):
        return None
    assert isinstance(transposed, Node) and isinstance(x, Node)
    weight = transposed.args[0]
    assert isinstance(weight, Node)
    given = [weight] if bias is None else [weight, bias]
    if not _is_few(value_of(x)) or not _are_parameters(given, value_of(x).dtype):
        return None
    if value_of(weight).dim() != 2 or (bias is not None and value_of(bias).dim() != 1):
        return None
    return _Product(node, x, weight, bias)


def _is_few(x: Any) -> bool:
    tokens = x.shape[0]
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and isinstance(tokens, int)
        and tokens <= MAX_DECODE_TOKENS
    )


def _are_parameters(nodes: Iterable[Node], dtype: torch.dtype) -> bool:
    """Whether these are inputs of the graph, which are there at its begin, of a dtype, in order."""
    return all(
        node.op == "placeholder"
        and value_of(node).dtype == dtype
        and value_of(node).is_contiguous()
        for node in nodes
    )


def _source(x: Node) -> tuple[Any, ...]:
    """What two views of one value have in common."""
    if is_call(x, _VIEWS):
        return (x.args[0], tuple(value_of(x).shape))
    return (x,)


def _replace(graph: Graph, products: list[_Product], session: Any) -> None:
    first = products[0]
    weights = [product.weight for product in products]
    biases = [product.bias for product in products if product.bias is not None]
    with graph.inserting_before(first.node):
        merged = call_op(
            graph,
            specmoe_ops().products.default,
            (first.x, weights, biases, session),
            like=first.node,
        )
        outs = [graph.call_function(operator.getitem, (merged, i)) for i in range(len(products))]
    for product, out in zip(products, outs, strict=True):
        set_value(out)
        product.node.replace_all_uses_with(out)
        graph.erase_node(product.node)
