"""Attention of a decode step reads the filled part of its static cache, and no repeated keys.

    before                                            after
    K = k[:, :, None].expand(..).reshape(B, N, S, D)  range = attended_range(mask)
    V = v[:, :, None].expand(..).reshape(B, N, S, D)  y = decode_attention(q, k, v, mask, range,
    y = scaled_dot_product_attention(q, K, V, mask)                        None, scale)

and, where a head has a sink (GPT-OSS):

    scores = matmul(q, K.transpose(2, 3)) * scale + mask
    joint = cat([scores, sinks.reshape(1, N, 1, 1).expand(..)])
    weights = softmax(joint - joint.max(-1))[..., :-1]
    y = matmul(weights, V)                            y = decode_attention(.., sinks, scale)

Works on the Dynamo graph, where attention is still one node and a mask one input. The range of a
mask is computed once per mask, and all layers that share it read it.
Shape letters: B sequences, N query heads, G heads of keys and values, Q new tokens, S cache length,
D head size.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

from specmoe_compile.kernels.checks import FLOAT_DTYPES
from specmoe_compile.kernels.decode_attention.op import MAX_HEAD, MAX_QUERIES, MAX_ROWS

_ALL = slice(None)
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(slots=True)
class AttentionReport:
    """What the pass did: attentions rewritten, and a reason for each that was not."""

    matches: int = 0
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Attention:
    """One attention of the graph: its operands, and the node that gives [B, N, Q, D]."""

    output: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    sinks: Node | None
    scale: float | None


class _Unlike(Exception):
    """The nodes are not those of an attention that this pass knows; says why."""


def read_filled_cache(gm: GraphModule, *, device_types: tuple[str, ...]) -> AttentionReport:
    """Rewrite the decode attention of `gm` in place; a second call finds nothing to do.

    Args:
        gm: Dynamo graph of inference.
        device_types: devices whose attention is rewritten, "cuda" or "cpu".
    """
    report = AttentionReport()
    bounds: dict[Node, Node] = {}
    for found in list(_attentions(gm.graph)):
        if isinstance(found, str):
            report.skipped.append(found)
            continue
        reason = _why_not(found, device_types)
        if reason is not None:
            report.skipped.append(f"{found.output.name}: {reason}")
            continue
        _rewrite(gm.graph, found, bounds)
        report.matches += 1
    if report.matches:
        gm.graph.lint()
        gm.recompile()
    return report


def _attentions(graph: Graph) -> Iterator[_Attention | str]:
    """Yield every attention, or why one is passed over, in order."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        read = None
        if node.target is functional.scaled_dot_product_attention:
            read = _read_sdpa
        elif node.target is torch.matmul and _is_softmax_of_sinks(node.args[0]):
            read = _read_with_sinks
        if read is not None:
            try:
                yield read(node)
            except _Unlike as why:
                yield f"{node.name}: {why}"


def _read_sdpa(node: Any) -> _Attention:
    given = dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p", 0.0) != 0.0 or given.get("is_causal", False) is not False:
        raise _Unlike("it has dropout or is causal by itself")
    q, k, v = (_node(given.get(name)) for name in ("query", "key", "value"))
    mask, scale = given.get("attn_mask"), given.get("scale")
    return _Attention(
        output=node,
        q=q,
        k=_without_repeats(k),
        v=_without_repeats(v),
        mask=mask if isinstance(mask, Node) else None,
        sinks=None,
        scale=_scale_or_none(scale, q),
    )


def _scale_or_none(scale: Any, q: Node) -> float | None:
    if isinstance(scale, int | float):
        return float(scale)
    value = _value(q)
    return value.shape[-1] ** -0.5 if scale is None and value is not None else None


def _is_softmax_of_sinks(node: Any) -> bool:
    """Whether `node` is softmax weights without their last column."""
    weights = _unwrapped(node)
    if not _calls(weights, operator.getitem) or weights.args[1] != (Ellipsis, slice(None, -1)):
        return False
    return _calls(weights.args[0], functional.softmax)


def _read_with_sinks(node: Any) -> _Attention:
    softmax = _node(_unwrapped(node.args[0]).args[0])
    if softmax.kwargs.get("dim") != -1:
        raise _Unlike("its softmax is over another dimension")
    joint = _node(softmax.args[0])
    if _calls(joint, operator.sub):
        # Less its maximum, which changes no softmax.
        joint, most = _node(joint.args[0]), _node(joint.args[1])
        maximum = _node(most.args[0]) if _calls(most, operator.getitem) else most
        if not (_is_method(maximum, "max") and maximum.args[0] is joint):
            raise _Unlike("its scores are shifted by something else than their maximum")
    if not _calls(joint, torch.cat) or joint.kwargs.get("dim") != -1:
        raise _Unlike("its softmax is not over scores beside sinks")
    scores, column = (_node(part) for part in _pair(joint.args[0]))
    mask = None
    if _calls(scores, operator.add):
        scores, mask = _node(scores.args[0]), _node(scores.args[1])
    if not _calls(scores, operator.mul) or not isinstance(scores.args[1], float):
        raise _Unlike("its scores have no constant scale")
    product, scale = _node(scores.args[0]), scores.args[1]
    if not _calls(product, torch.matmul):
        raise _Unlike("its scores are no product of queries and keys")
    q, turned = _node(product.args[0]), _node(product.args[1])
    if not _is_method(turned, "transpose") or turned.args[1:] not in ((2, 3), (-2, -1)):
        raise _Unlike("its scores are no product of queries and keys")
    return _Attention(
        output=node,
        q=q,
        k=_without_repeats(_node(turned.args[0])),
        v=_without_repeats(_node(node.args[1])),
        mask=mask,
        sinks=_sinks_of(column),
        scale=scale,
    )


def _sinks_of(column: Any) -> Any:
    """The vector [N] that is one more score of each head, [B, N, Q, 1]."""
    if not _is_method(column, "expand"):
        raise _Unlike("its sinks are not one number per head")
    shaped = _node(column.args[0])
    if not _is_method(shaped, "reshape") or tuple(shaped.args[1:]) != (1, -1, 1, 1):
        raise _Unlike("its sinks are not one number per head")
    return _node(shaped.args[0])


def _without_repeats(node: Any) -> Any:
    """What `repeat_kv` was called with, [B, G, S, D], or the node itself."""
    if not _is_method(node, "reshape") or not _is_method(node.args[0], "expand"):
        return node
    expanded = node.args[0]
    single = expanded.args[0]
    if not _calls(single, operator.getitem) or single.args[1] != (_ALL, _ALL, None, _ALL, _ALL):
        return node
    origin = _node(single.args[0])
    wide, whole = _value(expanded), _value(node)
    if wide is None or whole is None or wide.dim() != 5 or whole.dim() != 4:
        return node
    batch, heads, repeats, length, head = wide.shape
    if whole.shape != (batch, heads * repeats, length, head):
        return node
    return origin


def _why_not(found: _Attention, device_types: tuple[str, ...]) -> str | None:
    """Why an attention is left alone; None where it is rewritten."""
    if _changes_before(found.k, found.output) or _changes_before(found.v, found.output):
        return "its keys or values change before they are read"
    if found.mask is None:
        return "it has no mask, so that PyTorch's own kernel reads what there is"
    if found.scale is None:
        return "its scale is no constant"
    values = [_value(n) for n in (found.q, found.k, found.v, found.mask, found.output)]
    if any(value is None for value in values):
        return "an operand has no shape"
    q, k, v, mask, output = values
    assert q is not None and k is not None and v is not None and mask is not None
    assert output is not None
    if any(value.dim() != 4 for value in (q, k, v, mask)):
        return "an operand has not 4 dimensions"
    if q.device.type not in device_types:
        return f"attention on a {q.device.type} is left to PyTorch"
    fixed = (*q.shape, *k.shape[:2], k.shape[3], *mask.shape[:3])
    if not all(isinstance(size, int) for size in fixed):
        return "a size other than the cache's length is not fixed"
    sequences, heads, queries, head = q.shape
    if queries > MAX_QUERIES:
        return f"{queries} new tokens are a prefill"
    if k.shape != v.shape or k.shape[0] != sequences or k.shape[3] != head or head > MAX_HEAD:
        return f"keys and values have other head sizes than queries, or more than {MAX_HEAD}"
    if q.dtype not in FLOAT_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return "its dtypes differ"
    if output.dtype != q.dtype or output.shape != q.shape:
        return "its output is not like its queries"
    if heads % k.shape[1] or heads // k.shape[1] * queries > MAX_ROWS[q.dtype]:
        return f"{heads} heads share {k.shape[1]} heads of keys"
    fits = all(size in (1, most) for size, most in zip(mask.shape[:3], q.shape[:3], strict=True))
    if not fits or mask.shape[3] != k.shape[2]:
        return "its mask has another shape"
    return _why_not_sinks(found, heads)


def _changes_before(cache: Node, output: Node) -> bool:
    """Whether a cache is written between the first look at it and the attention."""
    looked = False
    for user in sorted(cache.users):
        if user >= output:
            break
        if user.op == "call_method" and str(user.target).endswith("_"):
            if looked:
                return True
        else:
            looked = True
    return False


def _why_not_sinks(found: _Attention, heads: int) -> str | None:
    if found.sinks is None:
        return None
    value = _value(found.sinks)
    if value is None or tuple(value.shape) != (heads,) or value.dtype not in FLOAT_DTYPES:
        return "its sinks are not one number per head"
    return None


def _rewrite(graph: Graph, found: _Attention, bounds: dict[Node, Node]) -> None:
    ops = torch.ops.specmoe_kernels
    mask, output = found.mask, found.output
    assert mask is not None and found.scale is not None
    if mask not in bounds:
        with graph.inserting_before(output):
            bounds[mask] = _call(graph, ops.attended_range.default, (mask,), output)
    args = (found.q, found.k, found.v, mask, bounds[mask], found.sinks, found.scale)
    with graph.inserting_before(output):
        call = _call(graph, ops.decode_attention.default, args, output)
    output.replace_all_uses_with(call)
    _erase_unused(graph, output)


def _call(graph: Graph, op: Any, args: tuple[Any, ...], like: Node) -> Node:
    node = graph.call_function(op, args)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack",) if key in like.meta}
    example = [_value(a) if isinstance(a, Node) else a for a in args]
    with torch.no_grad():
        node.meta["example_value"] = op(*example)
    return node


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erase a node without users, and what only it needed, but nothing that changes a tensor.

    Graph-wide dead-code removal would take the in-place updates of a static cache with it, whose
    results nobody reads.
    """
    if node.users or node.op not in ("call_function", "call_method"):
        return
    if node.op == "call_method" and str(node.target).endswith("_"):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        _erase_unused(graph, source)


def _unwrapped(node: Any) -> Any:
    """A node without casts and without a dropout that drops nothing."""
    while isinstance(node, Node):
        drops_nothing = _calls(node, functional.dropout) and (
            node.kwargs.get("p") == 0.0 or node.kwargs.get("training") is False
        )
        if not (drops_nothing or _is_method(node, "to")):
            break
        node = node.args[0]
    return node


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _Unlike("its softmax is not over scores beside sinks")
    return value[0], value[1]


def _node(value: Any) -> Any:
    """The value, which is a node; its arguments are any node's or constant's."""
    if not isinstance(value, Node):
        raise _Unlike("an operand is no tensor of the graph")
    return value


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _is_method(node: Any, name: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target == name


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None
