"""Routers that choose what a trace says, with the graph and the lookahead of the real ones.

A router's logits are replaced, in the model's own forward, by a row of a table on the device; which
row is a counter on the device, so a captured graph routes anew at every replay. All else of the
router stays: its product runs, its top-k and softmax run on what the table holds.

    logits = W x                     logits = where(driven, table[position].true, W x)
    ids, w = top-k of logits         ids, w = top-k of logits

The lookahead router is a clone of these nodes and would read the true row as well: recall 100 %.
`predict_from_trace`, a pass after it, points the clone at the row of the trace's own prediction:

    where(driven, select(row, 1, TRUE), W' q)  ->  where(driven, select(row, 1, PREDICTED), W' q)

Shape letters: T tokens, N trace tokens, E experts, K top-k, L MoE layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from benchmarks.full_size.trace import PREDICTED, TRUE
from specmoe_compile.passes import manager
from specmoe_compile.passes.fx_utils import clone_nodes
from specmoe_compile.passes.identity import source_hash
from specmoe_compile.passes.insert_lookahead_router import insert_lookahead_router
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.report import PassReport
from specmoe_compile.runtime.experts.module import ExpertsLayer


class _Traced(nn.Module):
    """What traced routers add to a router: `table` [N, 2, E] float32, `position`, `driven`."""

    table: Tensor
    position: Tensor
    driven: Tensor

    def routed(self, logits: Tensor) -> Tensor:
        """The table's row where the trace drives, else the logits: [T, E] -> [T, E] float32."""
        row = self.table[self.position]
        return torch.where(self.driven, row.select(1, TRUE), logits.float())


class TracedQwen3Router(_Traced, Qwen3MoeTopKRouter):
    """`Qwen3MoeTopKRouter.forward` on `routed` logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = self.routed(F.linear(hidden_states, self.weight))
        weights, ids = torch.topk(F.softmax(logits, dim=-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), ids


class TracedGptOssRouter(_Traced, GptOssTopKRouter):
    """`GptOssTopKRouter.forward` on `routed` logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.routed(F.linear(hidden_states, self.weight, self.bias))
        values, ids = torch.topk(logits, self.top_k, dim=-1)
        return logits, F.softmax(values, dim=1).to(hidden_states.dtype), ids


class TracedDeepseekV2Router(_Traced, DeepseekV2TopkRouter):
    """`DeepseekV2TopkRouter.forward` without groups on `routed` logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.topk_method == "greedy" and self.top_k, "groups have no table here"
        hidden_states = hidden_states.view(-1, self.hidden_dim)
        logits = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))
        logits = self.routed(logits)
        scores = logits.softmax(dim=-1, dtype=torch.float32)
        weights, ids = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        return logits, weights * self.routed_scaling_factor, ids


TRACED: dict[type[nn.Module], type[_Traced]] = {
    Qwen3MoeTopKRouter: TracedQwen3Router,
    GptOssTopKRouter: TracedGptOssRouter,
    DeepseekV2TopkRouter: TracedDeepseekV2Router,
}


@dataclass(frozen=True, slots=True)
class TracedRouting:
    """The device's half of trace-driven routing, shared by the routers of one model.

    Attributes:
        position: [1] int64, the trace's token that the next step routes by.
        driven: [] bool, whether the trace drives or the model's own routers do.
        length: N.
    """

    position: Tensor
    driven: Tensor
    length: int

    def start(self, driven: bool, position: int = 0) -> None:
        """Begin a run; between runs only, since it writes from the host."""
        self.position.fill_(position)
        self.driven.fill_(driven)

    def advance(self) -> None:
        """Go on to the next token, on the device."""
        self.position.add_(1)


def install_routing(model: nn.Module, layers: Sequence[ExpertsLayer], tables: Tensor) -> Any:
    """Let the routers of `layers` follow `tables`, [L, N, 2, E] float32 on the model's device.

    Raises:
        ValueError: a layer has no router of a known class.
    """
    device = tables.device
    routing = TracedRouting(
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.bool, device=device),
        tables.shape[1],
    )
    for layer in layers:
        parent = model.get_submodule(layer.name.rpartition(".")[0])
        routers = [child for child in parent.children() if type(child) in TRACED]
        if len(routers) != 1:
            raise ValueError(
                f"{layer.name} has {len(routers)} routers of a known class; expected one of"
                f" {', '.join(c.__name__ for c in TRACED)}."
            )
        router: Any = routers[0]
        router.__class__ = TRACED[type(router)]
        router.register_buffer("table", tables[layer.index].contiguous(), persistent=False)
        router.register_buffer("position", routing.position, persistent=False)
        router.register_buffer("driven", routing.driven, persistent=False)
        if device.type == "cuda":
            for buffer in (router.table, router.position, router.driven):
                # A CUDA graph reads them where they are, instead of copying them at each replay.
                torch._dynamo.mark_static_address(buffer, guard=False)
    return routing


def predict_from_trace(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Point cloned routers at the predicted row of their table.

    Args:
        graph: aten graph, changed in place.
        config: not read.
        plan: its layers have their predictions.
    """
    report = PassReport("predict_from_trace")
    for source in plan.layers:
        for target, ids, _ in source.predictions:
            where = _nearest_where(ids)
            row = None if where is None else where.args[1]
            if (
                not isinstance(row, Node)
                or row.target is not torch.ops.aten.select.int
                or row.args[1:] != (1, TRUE)
            ):
                report.skipped[target.index] = "its clone reads no row of a trace"
                continue
            assert where is not None
            predicted = clone_nodes(graph, [row], {}, where)[row]
            predicted.update_arg(2, PREDICTED)
            where.update_arg(1, predicted)
            report.matches += 1
    return report


def _nearest_where(ids: Node) -> Node | None:
    """The `where` that the ids are chosen from."""
    seen, queue = {ids}, [ids]
    while queue:
        node = queue.pop(0)
        if node.target is torch.ops.aten.where.self:
            return node
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return None


@contextmanager
def trace_predictions() -> Iterator[None]:
    """Compile with `predict_from_trace` among the passes."""
    at = manager.PASSES.index(insert_lookahead_router) + 1
    passes = (*manager.PASSES[:at], predict_from_trace, *manager.PASSES[at:])
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    # Compiled code without this pass must not be found in the cache.
    identity = f"{source_hash()}-{own}"
    with (
        mock.patch.object(manager, "PASSES", passes),
        mock.patch.object(manager, "source_hash", lambda: identity),
    ):
        yield
