"""Let one launch add up what ranks have of a decode step, in the place of an all-reduce.

    s = _c10d_functional::all_reduce(x, "sum", g)   ->   y = specmoe_kernels::sum_ranks(x, g)
    y = _c10d_functional::wait_tensor(s)

Where the group has inboxes in its GPUs' memory, and the tensor is small. Sums are of the ranks in
their order, in float32, rounded once: of two ranks the same bits as an all-reduce's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from specmoe_compile.kernels.sum_ranks.op import reason_against
from specmoe_compile.passes.fx_utils import call_op, find_calls, is_call, value_of
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.report import PassReport


def replace_sums(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Replace all-reduces of groups that have inboxes, of tensors that `sum_ranks` takes.

    Args:
        graph: aten graph, changed in place.
        config: names these groups, and says whether it was asked for.
        plan: not read.
    """
    report = PassReport("replace_sums")
    if not config.inbox_groups:
        return report
    ops: Any = torch.ops._c10d_functional
    for node in list(find_calls(graph, ops.all_reduce.default)):
        x, kind, group = node.args
        assert isinstance(x, Node), "what is reduced is a tensor"
        waits = list(node.users)
        if kind != "sum" or group not in config.inbox_groups or not _is_taken(x, config):
            continue
        if not waits or not all(is_call(wait, (ops.wait_tensor.default,)) for wait in waits):
            continue
        with graph.inserting_before(node):
            total = call_op(graph, torch.ops.specmoe_kernels.sum_ranks.default, (x, group), like=x)
        for wait in waits:
            wait.replace_all_uses_with(total)
            graph.erase_node(wait)
        graph.erase_node(node)
        report.matches += 1
    return report


def _is_taken(x: Node, config: PassConfig) -> bool:
    """Whether the kernel takes it, and may by the options."""
    value = value_of(x)
    if value.dtype.itemsize > config.one_shot_bytes:
        return False
    return reason_against(tuple(value.shape), value.dtype) is None


def rank_groups(gm: GraphModule, widest: int) -> tuple[str, ...]:
    """Names of the process groups over which a Dynamo graph adds up numbers, in order.

    Args:
        gm: the graph.
        widest: sums of numbers of more bytes do not count.
    """
    return tuple(dict.fromkeys(_groups(gm, widest)))


def _groups(gm: GraphModule, widest: int) -> Iterator[str]:
    if not torch.distributed.is_available():
        return
    ops: Any = torch.ops._c10d_functional
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if node.target not in (ops.all_reduce, ops.all_reduce.default):
                continue
            if node.args[0].meta["example_value"].dtype.itemsize <= widest:
                yield node.args[2]
