"""Predictors in the graph: what each reads, where it predicts, and what is left alone."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.passes.insert_predictor import attention_input_or_none
from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.predict.registry import PREDICTORS
from tests.passes.families import FAMILIES, tiny
from tests.passes.graphs import (
    OPS,
    TOP_K,
    attention,
    calls,
    find,
    inputs,
    layers_of,
    norm,
    plain_block,
    returning,
    route,
    trace,
    use_session,
)
from tests.passes.lowering import interpret_with


def _rewritten(config: PassConfig, layers: int = 3) -> tuple[Any, SpeculationPlan]:
    gm = trace(plain_block, layers=layers)
    plan = SpeculationPlan()
    report = run_passes(gm, config, check_each=True, plan=plan)
    assert not report.reason
    gm.recompile()
    return gm, plan


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("name", list(PREDICTORS))
def test_results_do_not_depend_on_the_predictor(
    monkeypatch: Any, name: str, conditional: bool
) -> None:
    session = use_session(monkeypatch)
    want = trace(plain_block)(*inputs())
    gm, _ = _rewritten(PassConfig(predictor=name, conditional=conditional, network_layers=(2,)))
    session.events.clear()
    torch.testing.assert_close(gm(*inputs()), want, rtol=0, atol=0)
    started = {layer for event, layer in session.events if event == "start"}
    assert started == ({0, 1, 2} if name == "pre_attention" else {1, 2})


@pytest.mark.parametrize(
    ("name", "blends", "predicts"),
    [
        ("default_vectors", 2, []),
        ("residual", 0, []),
        ("previous_token", 0, [1, 2]),
        ("estimator", 2, [1, 2]),
        ("pre_attention", 0, [0, 1, 2]),
        ("hybrid", 2, [2]),
    ],
)
def test_each_predictor_asks_for_what_it_reads(name: str, blends: int, predicts: list[int]) -> None:
    gm, plan = _rewritten(PassConfig(predictor=name, network_layers=(2,)))
    assert len(calls(gm.graph, "blend_default_vectors")) == blends
    assert [node.args[2] for node in calls(gm.graph, "predict_experts")] == predicts
    assert len(calls(gm.graph, "start_prefetch")) == sum(
        layer.ticket is not None for layer in plan.layers
    )


def test_residual_is_what_the_router_reads_without_default_vectors(monkeypatch: Any) -> None:
    session = use_session(monkeypatch)
    gm, plan = _rewritten(PassConfig(predictor="residual"))
    seen = returning(gm, [layer.residual for layer in plan.layers])(*inputs())
    gates = inputs()[1:]
    for layer in (1, 2):
        want, _ = route(norm(seen[layer - 1]), gates[layer])
        assert torch.equal(session.predicted[layer], want)


def test_residual_stands_for_all_layers_in_between(monkeypatch: Any) -> None:
    session = use_session(monkeypatch)
    gm, plan = _rewritten(PassConfig(predictor="residual", lookahead=2))
    (first, *_) = returning(gm, [plan.layers[0].residual])(*inputs())
    want, _ = route(norm(first), inputs()[3])
    assert torch.equal(session.predicted[2], want)


def test_estimator_reads_the_quasi_hidden_state(monkeypatch: Any) -> None:
    session = use_session(monkeypatch)
    gm, plan = _rewritten(PassConfig(predictor="estimator"))
    states = returning(gm, [layer.quasi for layer in plan.layers[:-1]])(*inputs())
    for layer, state in zip((1, 2), states, strict=True):
        assert torch.equal(session.states[layer], state)


def test_attention_input_is_the_state_before_the_attention(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    gm = trace(plain_block)
    layers = layers_of(gm)
    nodes = [attention_input_or_none(layer) for layer in layers]
    assert None not in nodes
    first, second, third = returning(gm, nodes)(*inputs())
    assert torch.equal(first, inputs()[0])
    outputs = returning(gm, [layer.output for layer in layers[:2]])(*inputs())
    assert torch.equal(second, outputs[0]) and torch.equal(third, outputs[1])


def test_pre_attention_starts_before_the_attention_and_is_not_guarded(monkeypatch: Any) -> None:
    session = use_session(monkeypatch)
    gm, plan = _rewritten(PassConfig(predictor="pre_attention", conditional=True))
    assert not calls(gm.graph, "plan_step")
    for layer in plan.layers:
        start = layer.ticket
        assert start is not None and layer.residual is not None and start < layer.residual
    gm(*inputs())
    for layer in (1, 2):
        assert session.at("correct", layer - 1) < session.at("start", layer)
        assert session.at("start", layer) < session.at("wait", layer)


def test_layer_without_an_attention_sum_is_passed_over() -> None:
    def scaled(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        return plain_block(attention(r) * 2.0, gate, layer)

    gm = trace([plain_block, scaled, plain_block])
    report = run_passes(gm, PassConfig(predictor="pre_attention"))
    assert list(report.skipped) == [1]
    assert "is no sum of its attention" in report.skipped[1]


@pytest.mark.parametrize(("width", "expected"), [(None, TOP_K), (1, TOP_K), (5, 5)])
def test_width_is_the_networks_but_not_of_history(width: int | None, expected: int) -> None:
    for name, want in (("estimator", expected), ("previous_token", TOP_K)):
        gm, _ = _rewritten(PassConfig(predictor=name, prefetch_width=width))
        for node in calls(gm.graph, "predict_experts"):
            assert node.args[3] == want
            ids, weights = (
                next(u for u in node.users if u.target is operator.getitem and u.args[1] == place)
                for place in (0, 1)
            )
            assert ids.meta["val"].shape == weights.meta["val"].shape == (3, want)


def test_skipped_layers_are_not_predicted() -> None:
    gm, _ = _rewritten(PassConfig(predictor="pre_attention", skip_layers=(0, 2)))
    assert [node.args[2] for node in calls(gm.graph, "predict_experts")] == [1]


def test_control_ignores_the_predictor(monkeypatch: Any) -> None:
    session = use_session(monkeypatch)
    gm, _ = _rewritten(PassConfig(predictor="pre_attention", control=True))
    gm(*inputs())
    assert session.recall == {1: [1.0], 2: [1.0]}


def test_paths_of_pre_attention_include_the_first_layer() -> None:
    plan = find(trace(plain_block), PassConfig(predictor="pre_attention"))
    assert [[layer.index for layer in path] for path in plan.paths] == [[0], [1], [2]]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_has_a_state_before_its_attention(monkeypatch: Any, family: str) -> None:
    session = use_session(monkeypatch, hidden=64)
    model, count = tiny(family)
    want = model(torch.arange(1, 6)[None], use_cache=False).logits

    def passes(graph: Any) -> None:
        report = run_passes(graph, PassConfig(predictor="pre_attention"), check_each=True)
        assert not report.skipped

    session.events.clear()
    got = interpret_with(model, passes)(torch.arange(1, 6)[None], use_cache=False).logits
    torch.testing.assert_close(got, want)
    assert {layer for event, layer in session.events if event == "start"} == set(range(count))


def test_fake_has_the_shapes_of_the_real_op(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    torch.library.opcheck(OPS.predict_experts.default, (torch.randn(2, 3, 16), 0, 1, 4))
    ids, weights = OPS.predict_experts(torch.randn(2, 3, 16), 0, 1, 4)
    assert ids.shape == weights.shape == (6, 4)
