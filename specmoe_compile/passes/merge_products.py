"""Let the engine multiply in a decode step: one call for all weights of an input.

    q = aten::mm(x, permute(wq))         q, k, v = specmoe::products(x, [wq, wk, wv], [], s)
    k = aten::mm(x, permute(wk))    ->
    v = aten::mm(x, permute(wv))

On a CPU PyTorch's own products take some 30 us each, however small, and share large ones by OpenMP,
whose threads keep spinning on the cores that the engine's threads compute experts on. On a GPU a
token's small products take several times what reading their weights does: where steps are captured
in CUDA graphs, so that launching is nobody's time, `specmoe_kernels::products` takes one token's.

Shape letters: T tokens, N outputs, I inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from specmoe_compile.kernels.products.op import MAX_OUTPUTS, MAX_WEIGHTS
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
_MOST_TOKENS = {"cpu": MAX_DECODE_TOKENS, "cuda": 1}
_TRANSPOSES = (torch.ops.aten.permute.default, torch.ops.aten.t.default)
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class _Product(NamedTuple):
    """`node` = x [T, I] times weight [N, I] transposed, plus bias [N] if there is one."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None


def merge_products(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Replace products with parameters, all those of one input at once: of 1 to 16 tokens on a CPU.

    On a GPU of one token, up to `MAX_WEIGHTS` weights of `MAX_OUTPUTS` outputs at once.

    Args:
        graph: aten graph, changed in place.
        config: says whether the sessions' engine multiplies, and may.
        plan: not read.
    """
    report = PassReport("merge_products")
    dispatch = _first_dispatch(graph)
    if not (config.products and config.multiplies) or dispatch is None:
        return report
    groups: dict[tuple[Any, ...], list[_Product]] = {}
    for node in graph.nodes:
        product = _product_or_none(node)
        if product is not None:
            key = (_source(product.x), product.bias is None)
            groups.setdefault(key, []).append(product)
    for products in groups.values():
        report.matches += len(products)
        if not value_of(products[0].x).is_cuda:
            _replace(graph, products, specmoe_ops().products.default, dispatch.args[-2])
            continue
        for start in range(0, len(products), MAX_WEIGHTS):
            some = products[start : start + MAX_WEIGHTS]
            _replace(graph, some, torch.ops.specmoe_kernels.products.default)
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
    if value_of(x).is_cuda and value_of(weight).shape[0] > MAX_OUTPUTS:
        return None
    return _Product(node, x, weight, bias)


def _is_few(x: Any) -> bool:
    tokens, most = x.shape[0], _MOST_TOKENS.get(x.device.type, 0)
    return x.dtype in _DTYPES and isinstance(tokens, int) and tokens <= most


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


def _replace(graph: Graph, products: list[_Product], op: Any, *more: Any) -> None:
    """Put one call of an op of input, weights and biases, and `more`, in the place of products."""
    first = products[0]
    weights = [product.weight for product in products]
    biases = [product.bias for product in products if product.bias is not None]
    with graph.inserting_before(first.node):
        merged = call_op(graph, op, (first.x, weights, biases, *more), like=first.node)
        outs = [graph.call_function(operator.getitem, (merged, i)) for i in range(len(products))]
    for product, out in zip(products, outs, strict=True):
        set_value(out)
        product.node.replace_all_uses_with(out)
        graph.erase_node(product.node)
