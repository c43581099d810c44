"""The quasi-hidden state: what the layer would put out with default vectors for its experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specmoe_compile.passes.check_invariants import check_invariants
from specmoe_compile.passes.insert_default_vectors import insert_default_vectors
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import (
    OPS,
    calls,
    find,
    inputs,
    norm,
    plain_block,
    returning,
    route,
    trace,
    use_session,
)

CONFIG = PassConfig()


def _shared_block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    return r + (OPS.experts(x, ids, weights, 0, layer) * 0.5 + torch.tanh(x))


def test_blend_reads_the_layers_own_routing() -> None:
    gm = trace(plain_block)
    plan = find(gm)
    report = insert_default_vectors(gm.graph, CONFIG, plan)
    assert report.matches == 2 and not report.skipped
    for blend, layer in zip(calls(gm.graph, "blend_default_vectors"), plan.layers[:2], strict=True):
        assert blend.args == (layer.ids, layer.weights, layer.x, 0, layer.index)
        assert blend.meta["val"].shape == layer.x.meta["val"].shape
    check_invariants(gm.graph, complete=False)


def test_quasi_state_keeps_shared_experts_and_scaling(monkeypatch: Any) -> None:
    session = use_session(monkeypatch)
    gm = trace(_shared_block, layers=2)
    plan = find(gm)
    insert_default_vectors(gm.graph, CONFIG, plan)
    first = plan.layers[0]
    nodes = [first.quasi, first.residual, first.x, first.ids, first.weights]
    quasi, residual, x, ids, weights = returning(gm, nodes)(*inputs(2))
    blend = session.blend_default_vectors(0, ids, weights, x)
    torch.testing.assert_close(quasi, residual + (blend * 0.5 + torch.tanh(x)), rtol=0, atol=0)


def test_shared_experts_run_before_the_experts() -> None:
    gm = trace(_shared_block, layers=2)
    plan = find(gm)
    insert_default_vectors(gm.graph, CONFIG, plan)
    (first, _) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    assert first < plan.layers[0].experts
    gm.graph.lint()


def test_result_is_unchanged(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    gm = trace(_shared_block)
    want = gm(*inputs())
    insert_default_vectors(gm.graph, CONFIG, find(gm))
    gm.recompile()
    torch.testing.assert_close(gm(*inputs()), want, rtol=0, atol=0)


def test_sum_that_cannot_be_computed_early_is_left_alone() -> None:
    noise = torch.ops.aten.bernoulli.default

    def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        ids, weights = route(x, gate)
        y = OPS.experts(x, ids, weights, 0, layer)
        return r + (y + noise(torch.sigmoid(x)))

    gm = trace(block, layers=2)
    before = str(gm.graph)
    report = insert_default_vectors(gm.graph, CONFIG, find(gm))
    assert report.matches == 0
    assert "which cannot be moved" in report.skipped[1]
    assert str(gm.graph) == before


def test_last_layer_gets_none() -> None:
    gm = trace(plain_block)
    plan = find(gm)
    insert_default_vectors(gm.graph, CONFIG, plan)
    assert [layer.quasi is None for layer in plan.layers] == [False, False, True]


def test_control_mode_blends_nothing() -> None:
    config = PassConfig(control=True)
    gm = trace(plain_block)
    report = insert_default_vectors(gm.graph, config, find(gm, config))
    assert report.matches == 0 and not calls(gm.graph, "blend_default_vectors")


def test_twice_is_once() -> None:
    gm = trace(plain_block)
    plan = find(gm)
    insert_default_vectors(gm.graph, CONFIG, plan)
    before = str(gm.graph)
    assert insert_default_vectors(gm.graph, CONFIG, plan).matches == 0
    assert str(gm.graph) == before
