"""Small MoE stacks as aten graphs, and a session that records what runs, in order.

Shape letters: T tokens, E experts, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

import specmoe_compile.ops
from specmoe_compile.passes.choose_predictions import choose_predictions
from specmoe_compile.passes.find_moe_layers import find_moe_layers
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan

TOKENS, EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 16
OPS = torch.ops.specmoe

Block = Callable[[Tensor, Tensor, int], Tensor]


class RecordingSession:
    """Computes experts from random matrices and records every call as (name, layer)."""

    def __init__(self, hidden: int = HIDDEN, experts: int = EXPERTS) -> None:
        self.events: list[tuple[str, int]] = []
        self.predicted: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.tickets: dict[int, int] = {}
        self.recall: dict[int, list[float]] = {}
        self.hidden, self.num_experts = hidden, experts
        self.unwanted: set[int] = set()

    def _outputs(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(layer)
        shape = (self.num_experts, self.hidden, self.hidden)
        matrices = torch.randn(shape, generator=generator).to(x.dtype) / self.hidden**0.5
        return torch.einsum("th,tkhg->tkg", x, matrices[ids])

    def experts(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.events.append(("experts", layer))
        return self._reduce(self._outputs(layer, x, ids), weights, x)

    @staticmethod
    def _reduce(partial: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        return (partial * weights[..., None]).sum(dim=1).to(x.dtype)

    def blend_default_vectors(
        self, layer: int, ids: Tensor, weights: Tensor, like: Tensor
    ) -> Tensor:
        self.events.append(("blend", layer))
        generator = torch.Generator().manual_seed(1000 + layer)
        vectors = torch.randn(self.num_experts, self.hidden, generator=generator)
        return (vectors[ids] * weights[..., None].float()).sum(dim=1).to(like.dtype)

    def predict_experts(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        self.events.append(("predict", layer))
        self.states[layer] = state.clone()
        ids = torch.arange(layer, layer + width).remainder(self.num_experts)
        return ids.repeat(len(state), 1), torch.full((len(state), width), 1.0 / width)

    def start_prefetch(self, layer: int, ids: Tensor, weights: Tensor) -> int:
        assert ids.shape == weights.shape
        self.events.append(("start", layer))
        self.predicted[layer] = ids.clone()
        self.tickets[layer] = 10 + layer
        return 10 + layer

    def plan_step(self, layers: Sequence[int], edges: Sequence[int], ids: Tensor) -> list[bool]:
        self.events.append(("plan", -1))
        pairs = list(zip(edges[::2], edges[1::2], strict=True))
        return [any(n in pair and pair[1] not in self.unwanted for pair in pairs) for n in layers]

    def wait_prefetch(self, ticket: int, layer: int, ids: Tensor) -> int:
        self.events.append(("wait", layer))
        assert ticket == self.tickets.pop(layer, -1)
        if ticket >= 0:
            found = (self.predicted[layer][:, None, :] == ids[:, :, None]).any(-1)
            self.recall.setdefault(layer, []).append(found.float().mean().item())
        return 100 + layer

    def run_resident_experts(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, state: int
    ) -> Tensor:
        assert state == 100 + layer
        self.events.append(("run", layer))
        return self._outputs(layer, x, ids)

    def correct_experts(
        self, layer: int, partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor, state: int
    ) -> Tensor:
        assert state == 100 + layer
        self.events.append(("correct", layer))
        return self._reduce(partial, weights, x)

    def at(self, name: str, layer: int) -> int:
        """Position of the one call (name, layer) in the order of execution."""
        found = [i for i, event in enumerate(self.events) if event == (name, layer)]
        assert len(found) == 1, f"{name} of layer {layer} ran {len(found)} times: {self.events}"
        return found[0]


def use_session(monkeypatch: Any, **kwargs: Any) -> RecordingSession:
    """Let every op run on a new recording session."""
    session = RecordingSession(**kwargs)
    monkeypatch.setattr(specmoe_compile.ops, "get_session", lambda handle: session)
    return session


def norm(r: Tensor) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    wide = r.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(r.dtype)


def route(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax top-k router: ids and weights, both [T, K]."""
    weights, ids = torch.topk(torch.softmax(x @ gate.t(), -1, dtype=torch.float32), TOP_K)
    return ids, weights / weights.sum(-1, keepdim=True)


def attention(r: Tensor) -> Tensor:
    """Something that mixes tokens and depends on all of r."""
    x = norm(r)
    return r + torch.softmax(x @ x.transpose(-1, -2), -1) @ x


def plain_block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    """r -> r + experts(norm(r)), [T, H]."""
    x = norm(r)
    ids, weights = route(x, gate)
    return r + OPS.experts(x, ids, weights, 0, layer)


def hashed_ids(gate: Tensor) -> Tensor:
    """Experts that do not depend on the state, [T, K], as where a table of tokens has them."""
    return torch.topk(gate[:TOKENS, :EXPERTS], TOP_K, sorted=False).indices


def hashed_block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    """A block whose experts are chosen by the token, and weighed by the state."""
    x = norm(r)
    ids = hashed_ids(gate)
    weights = torch.sigmoid(x @ gate.t()).gather(1, ids)
    return r + OPS.experts(x, ids, weights, 0, layer)


def trace(
    block: Block | Sequence[Block],
    *,
    layers: int = 3,
    r: Tensor | None = None,
    tracing_mode: str = "fake",
) -> GraphModule:
    """Trace `layers` blocks, attention before each, to a functional aten graph with fake values.

    The tracing mode "symbolic" leaves the sizes of `r` open.
    """
    blocks = [block] * layers if callable(block) else list(block)

    def model(r: Tensor, gates: list[Tensor]) -> Tensor:
        for index, run in enumerate(blocks):
            r = run(attention(r), gates[index], index)
        return r

    gates = [torch.randn(EXPERTS, HIDDEN) for _ in blocks]
    state = torch.randn(TOKENS, HIDDEN) if r is None else r
    gm = make_fx(model, tracing_mode=tracing_mode)(state, [g.to(state.dtype) for g in gates])
    gm.graph.eliminate_dead_code()
    # Flat arguments, and outputs that a test may add to.
    gm.graph.set_codegen(CodeGen())
    return returning(gm, gm.graph.find_nodes(op="output")[0].all_input_nodes[0])


def returning(gm: GraphModule, result: Any) -> GraphModule:
    """Make a graph return a node, or several in a list."""
    (output,) = gm.graph.find_nodes(op="output")
    output.args = (result,)
    gm.recompile()
    return gm


def inputs(blocks: int = 3, r: Tensor | None = None) -> list[Tensor]:
    """Arguments of a traced graph: r, then the routers' weights."""
    generator = torch.Generator().manual_seed(5)
    gates = [torch.randn(EXPERTS, HIDDEN, generator=generator) for _ in range(blocks)]
    state = torch.randn(TOKENS, HIDDEN, generator=generator) if r is None else r
    return [state, *(g.to(state.dtype) for g in gates)]


def find(gm: GraphModule, config: PassConfig | None = None) -> SpeculationPlan:
    """Run the two passes that only look."""
    plan = SpeculationPlan()
    find_moe_layers(gm.graph, config or PassConfig(), plan)
    choose_predictions(gm.graph, config or PassConfig(), plan)
    return plan


def layers_of(gm: GraphModule) -> list[MoELayer]:
    """The MoE layers of a graph."""
    return find(gm).layers


def calls(graph: Graph, name: str) -> list[Node]:
    """Calls of `specmoe::name`, in order."""
    return list(graph.find_nodes(op="call_function", target=getattr(OPS, name).default))
