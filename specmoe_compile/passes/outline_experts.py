"""Fold each call of a plain experts module into one dispatch node.

Works on the Dynamo graph, before AOTAutograd. A model that was offloaded needs no outlining: its
experts modules trace to `specmoe::experts` by themselves.

    before                                             after
    ids_sorted, perm = sort(ids.reshape(-1))           y = specmoe::experts(x, ids, w, session, l)
    h = grouped_mm(x[perm // K], gate_up.mT, offs)
    ... activation, grouped_mm, weights, sum ...
    y

The nodes of a call are those whose `nn_module_stack` names the module (class name ends in
"Experts"). The session of a plain model reads the module's own parameters in place.
Shape letters: T tokens, E experts, K top-k, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

import specmoe_compile.ops  # noqa: F401  (registers the ops)

log = logging.getLogger(__name__)


class ExpertsModules(Protocol):
    """Finds the experts modules of a graph, and gives each a session and a layer in it."""

    def owner_of(
        self, parameters: Sequence[Any], module_class: type[nn.Module] | str
    ) -> nn.Module | None:
        """Return the module whose parameters are exactly these, or None."""

    def session_for(self, module: nn.Module) -> tuple[int, int]:
        """Return the handle of a module's session, and its layer there."""


@dataclass(slots=True)
class OutlineReport:
    """What the pass did: modules outlined, and a reason for each that was not."""

    matches: int = 0
    skipped: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Region:
    """The nodes of one call of one experts module, in graph order."""

    path: str
    module_class: type[nn.Module] | str
    nodes: list[Node] = field(default_factory=list)


def find_dispatch_nodes(graph: Graph) -> list[Node]:
    """Return the `specmoe::experts` nodes of a Dynamo or aten graph, in order."""
    op = torch.ops.specmoe.experts
    return [n for n in graph.nodes if n.op == "call_function" and n.target in (op, op.default)]


def outline_experts(gm: GraphModule, modules: ExpertsModules) -> OutlineReport:
    """Replace every experts region of `gm` in place; a second call finds nothing to do."""
    report = OutlineReport()
    for region in list(_regions(gm.graph)):
        reason = _outline(gm.graph, region, modules)
        if reason is None:
            report.matches += 1
        else:
            report.skipped.append(f"{region.path}: {reason}")
    if report.matches:
        gm.graph.lint()
        gm.recompile()
    return report


def _regions(graph: Graph) -> Iterator[_Region]:
    open_regions: dict[str, _Region] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        found = _experts_entry(node)
        if found is None:
            continue
        path, module_class = found
        open_regions.setdefault(path, _Region(path, module_class)).nodes.append(node)
    op = torch.ops.specmoe.experts
    for region in open_regions.values():
        if not any(n.target in (op, op.default) for n in region.nodes):
            yield region


def _experts_entry(node: Node) -> tuple[str, Any] | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    for path, module_class in stack.values():
        name = module_class if isinstance(module_class, str) else module_class.__name__
        if name.rsplit(".", 1)[-1].endswith("Experts"):
            return path, module_class
    return None


def _example(node: Node) -> Any:
    return node.meta.get("example_value")


def _outline(graph: Graph, region: _Region, modules: ExpertsModules) -> str | None:
    """Replace one region; returns the reason when it is left alone."""
    inside = set(region.nodes)
    inputs: list[Node] = []
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in inputs:
                inputs.append(source)
    parameters = [n for n in inputs if isinstance(_parameter(n), nn.Parameter)]
    module = modules.owner_of([_parameter(n) for n in parameters], region.module_class)
    if module is None:
        return "no live experts module owns its parameters"
    roles = _roles([n for n in inputs if n not in parameters])
    if roles is None:
        return "its inputs are not one [T,H] state, one [T,K] index and one [T,K] weight"
    outputs = [
        n
        for n in region.nodes
        if isinstance(_example(n), torch.Tensor) and any(u not in inside for u in n.users)
    ]
    if len(outputs) != 1:
        return f"it has {len(outputs)} tensor outputs, expected 1"
    session, layer = modules.session_for(module)
    (output,) = outputs
    with graph.inserting_after(output):
        call = graph.call_function(torch.ops.specmoe.experts, (*roles, session, layer))
    call.meta["nn_module_stack"] = output.meta["nn_module_stack"]
    call.meta["example_value"] = _example(output)
    output.replace_all_uses_with(call)
    # Only the region's own nodes: graph-wide dead-code removal would take the in-place updates of a
    # static cache with it, whose results nobody reads.
    for node in reversed(region.nodes):
        if not node.users:
            graph.erase_node(node)
    return None


def _parameter(node: Node) -> Any:
    """The tensor behind a placeholder that Dynamo made for a module's parameter."""
    argument = node.meta.get("grapharg")
    return getattr(argument, "example", None) if argument is not None else None


def _roles(nodes: list[Node]) -> tuple[Node, Node, Node] | None:
    """Tell (x [T,H], ids [T,K], weights [T,K]) apart by dtype and shape."""
    tensors = [n for n in nodes if isinstance(_example(n), torch.Tensor)]
    ids = [n for n in tensors if not _example(n).is_floating_point() and _example(n).dim() == 2]
    if len(ids) != 1:
        return None
    routing = _example(ids[0]).shape
    floats = [n for n in tensors if _example(n).is_floating_point() and _example(n).dim() == 2]
    weights = [n for n in floats if _example(n).shape == routing]
    if len(floats) != 2 or not weights:
        return None
    # A hidden size equal to top-k would make both match: the router's weights come last.
    weight = weights[-1]
    state = next(n for n in floats if n is not weight)
    return state, ids[0], weight
