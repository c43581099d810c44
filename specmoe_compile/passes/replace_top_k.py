"""Let one small launch choose experts on a GPU, in the place of PyTorch's two.

    values, ids = aten::topk(scores, K)   ->   values, ids = specmoe_kernels::top_k(scores, K)

The model's routers and their clones alike, groups of experts included: every `topk` of a matrix
with few columns. Of equal scores `top_k` takes the first; which ones `topk` takes on a GPU is not
defined, so that nothing is lost.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from specmoe_compile.kernels.checks import FLOAT_DTYPES
from specmoe_compile.kernels.top_k.op import MAX_K, MAX_SCORES
from specmoe_compile.passes.fx_utils import argument_of, find_calls, value_of
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.report import PassReport


def replace_top_k(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Replace every `topk` that `specmoe_kernels::top_k` can do.

    Args:
        graph: aten graph, changed in place.
        config, plan: not read.
    """
    report = PassReport("replace_top_k")
    for node in list(find_calls(graph, torch.ops.aten.topk.default)):
        if not _is_small(node):
            continue
        node.args = (argument_of(node, "self"), argument_of(node, "k"))
        node.kwargs = {}
        node.target = torch.ops.specmoe_kernels.top_k.default
        report.matches += 1
    return report


def _is_small(top_k: Node) -> bool:
    """Whether an `aten.topk` is one on a GPU that `specmoe_kernels::top_k` can do."""
    k = argument_of(top_k, "k")
    value = value_of(argument_of(top_k, "self"))
    count = value.shape[-1]
    return (
        value.is_cuda
        and value.dtype in FLOAT_DTYPES
        and value.dim() == 2
        and argument_of(top_k, "dim") in (-1, 1)
        and argument_of(top_k, "largest") is True
        and isinstance(count, int)
        and count <= MAX_SCORES
        and isinstance(k, int)
        and k <= MAX_K
    )
