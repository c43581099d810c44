"""Choose which MoE layer is predicted from which, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import statically_known_true

from specmoe_compile.passes.fx_utils import value_of
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer, SpeculationPlan
from specmoe_compile.passes.report import PassReport

FIRST_LAYER = "it is the first MoE layer: nothing comes before it to predict it from"
SKIPPED = "option skip_layers names it"
PREFILL = "this graph is prefill: a session predicts steps of few tokens only"
RESIDENT = "every expert has a slot: none can be missing"
ON_PURPOSE = (FIRST_LAYER, SKIPPED, PREFILL, RESIDENT)
"""Reasons that are nobody's shortcoming."""


def choose_predictions(graph: Graph, config: PassConfig, plan: SpeculationPlan) -> PassReport:
    """Fill in `plan.paths`: one path per layer to predict, in order of their targets.

    A layer nearer to the first one than `lookahead` is predicted from the first. Where predictions
    read what the layer's own attention reads, a path is its target alone, and the first layer has
    one as well.

    Args:
        graph: aten graph, not changed.
        config: `lookahead`, `skip_layers`, `resident_layers`, `max_tokens`, `control`, `predictor`.
        plan: with its layers.

    Returns:
        A report with a reason for every layer that is not predicted.
    """
    report = PassReport("choose_predictions")
    plan.paths = []
    for position, target in enumerate(plan.layers):
        before = [layer for layer in plan.layers[:position] if layer.session == target.session]
        path = [*before[-config.lookahead :], target]
        reason = _why_not(path, config)
        if reason is not None:
            report.skipped[target.index] = reason
            continue
        plan.paths.append(path[-1:] if _predicts_itself(config) else path)
    report.matches = len(plan.paths)
    return report


def _predicts_itself(config: PassConfig) -> bool:
    return config.control or config.state == "pre_attention"


def _why_not(path: Sequence[MoELayer], config: PassConfig) -> str | None:
    target = path[-1]
    if len(path) == 1 and (config.control or not _predicts_itself(config)):
        return FIRST_LAYER
    if config.skips(target.index):
        return SKIPPED
    if target.index in config.resident_layers:
        return RESIDENT
    tokens = value_of(target.ids).shape[0]
    if config.max_tokens is not None and statically_known_true(tokens > config.max_tokens):
        return PREFILL
    if target.reason is not None:
        return target.reason
    if _predicts_itself(config):
        return None
    for layer in path[:-1]:
        if layer.reason is not None:
            return f"it would be predicted from MoE layer {layer.index}, where {layer.reason}"
    return None
