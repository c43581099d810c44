"""What the passes on one graph know in common: its MoE layers, and which is predicted from which.

Shape letters: T tokens, K top-k, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(slots=True, eq=False)
class MoELayer:
    """One MoE layer of the graph, and what the passes made for it.

    Attributes:
        experts: its `specmoe::experts` node; erased once the layer is split.
        x: input of the experts, [T, H].
        ids: true experts, [T, K] integers.
        weights: true router weights, [T, K].
        session: handle of its session.
        index: MoE layer ordinal.
        residual: r; None when it was not found, `reason` then says why.
        output: h.
        router: nodes from r to ids and weights, in order.
        update: nodes from the experts to h, in order.
        reason: why speculation passes this layer over.
        quasi: h with the experts replaced by default vectors, or r (`insert_default_vectors`).
        predictions: (layer, ids, weights) predicted from here (`insert_lookahead_router`,
            `insert_predictor`).
        tickets: prefetches that are started here (`insert_expert_prefetch`).
        ticket: the prefetch of this layer's experts.
        is_split: whether its execution was split (`split_expert_execution`).
        parts: its wait, run and correction; empty before it is split, and in a branch.
    """

    experts: Node
    x: Node
    ids: Node
    weights: Node
    session: int
    index: int
    residual: Node | None = None
    output: Node | None = None
    router: list[Node] = field(default_factory=list)
    update: list[Node] = field(default_factory=list)
    reason: str | None = None
    quasi: Node | None = None
    predictions: list[tuple[MoELayer, Node, Node]] = field(default_factory=list)
    tickets: list[Node] = field(default_factory=list)
    ticket: Node | None = None
    is_split: bool = False
    parts: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class SpeculationPlan:
    """What the passes found and made, in the order in which they ran.

    Attributes:
        layers: MoE layers in graph order (`find_moe_layers`).
        paths: per predicted layer, in order: source, layers in between, target
            (`choose_predictions`). In control mode a path is its target alone.
    """

    layers: list[MoELayer] = field(default_factory=list)
    paths: list[list[MoELayer]] = field(default_factory=list)
