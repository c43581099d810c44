"""The lookahead router: a clone of the model's own nodes on another state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from specmoe_compile.passes.check_invariants import check_invariants
from specmoe_compile.passes.insert_default_vectors import insert_default_vectors
from specmoe_compile.passes.insert_lookahead_router import insert_lookahead_router
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.report import PassReport
from tests.passes.graphs import (
    EXPERTS,
    OPS,
    TOKENS,
    TOP_K,
    attention,
    calls,
    find,
    hashed_block,
    hashed_ids,
    inputs,
    norm,
    plain_block,
    returning,
    route,
    trace,
    use_session,
)


def _predicted(
    gm: GraphModule, config: PassConfig | None = None
) -> tuple[SpeculationPlan, PassReport]:
    config = config or PassConfig()
    plan = find(gm, config)
    insert_default_vectors(gm.graph, config, plan)
    report = insert_lookahead_router(gm.graph, config, plan)
    check_invariants(gm.graph, complete=False)
    return plan, report


def _run(gm: GraphModule, nodes: list[Node]) -> list[Tensor]:
    """Run a graph and return the values of some of its nodes."""
    return returning(gm, nodes)(*inputs())  # type: ignore[no-any-return]


def _sigmoid_block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    scores = torch.sigmoid((x @ gate.t()).float())
    ids = torch.topk(scores + 0.1, TOP_K, sorted=False).indices
    weights = scores.gather(1, ids)
    return r + OPS.experts(x, ids, weights / weights.sum(-1, keepdim=True) * 2.5, 0, layer)


def _sigmoid_route(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid((x @ gate.t()).float())
    ids = torch.topk(scores + 0.1, TOP_K, sorted=False).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * 2.5


@pytest.mark.parametrize(
    ("block", "router"), [(plain_block, route), (_sigmoid_block, _sigmoid_route)]
)
def test_prediction_is_the_next_router_on_the_quasi_state(
    monkeypatch: Any, block: Callable[..., Tensor], router: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    use_session(monkeypatch)
    gm = trace(block)
    plan, report = _predicted(gm)
    assert report.matches == 2 and not report.skipped
    for source, target in zip(plan.layers, plan.layers[1:], strict=False):
        ((predicted, ids, weights),) = source.predictions
        assert predicted is target
        assert ids < source.experts and weights < source.experts
    ((_, ids, weights),) = plan.layers[0].predictions
    assert plan.layers[0].quasi is not None
    quasi, *found = _run(gm, [plan.layers[0].quasi, ids, weights])
    want = router(norm(quasi), inputs()[2])
    torch.testing.assert_close(found, list(want), rtol=0, atol=0)


def test_hashed_experts_are_known_ahead(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    gm = trace(hashed_block)
    want = gm(*inputs())
    plan, report = _predicted(gm, PassConfig(prefetch_width=4))
    assert report.matches == 2 and not report.skipped
    source = plan.layers[0]
    ((_, ids, weights),) = source.predictions
    assert ids < source.experts and weights < source.experts
    assert source.quasi is not None and source.output is not None
    h, quasi, found, weighed = _run(gm, [plan.layers[2].output, source.quasi, ids, weights])  # type: ignore[list-item]
    gate = inputs()[2]
    assert torch.equal(found, hashed_ids(gate))
    torch.testing.assert_close(
        weighed, torch.sigmoid(norm(quasi) @ gate.t()).gather(1, found), rtol=0, atol=0
    )
    assert torch.equal(h, want)


def test_true_router_is_untouched(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    gm = trace(plain_block)
    want = gm(*inputs())
    _predicted(gm)
    gm.recompile()
    torch.testing.assert_close(gm(*inputs()), want, rtol=0, atol=0)


def test_lookahead_of_two_repeats_the_step(monkeypatch: Any) -> None:
    session = use_session(monkeypatch)
    gm = trace(plain_block)
    plan, report = _predicted(gm, PassConfig(lookahead=2))
    assert report.matches == 2
    first = plan.layers[0]
    assert [target.index for target, _, _ in first.predictions] == [1, 2]
    (_, ids1, weights1), (_, ids2, weights2) = first.predictions
    assert first.quasi is not None
    q, x, i1, w1, i2, w2 = _run(gm, [first.quasi, first.x, ids1, weights1, ids2, weights2])
    next_state = q + session.blend_default_vectors(1, i1, w1, x)
    want = route(norm(next_state), inputs()[3])
    torch.testing.assert_close([i2, w2], list(want), rtol=0, atol=0)


def test_width_predicts_more_experts_than_the_model_uses() -> None:
    gm = trace(plain_block)
    plan, _ = _predicted(gm, PassConfig(prefetch_width=5))
    ((_, ids, weights),) = plan.layers[0].predictions
    assert ids.meta["val"].shape == weights.meta["val"].shape == (TOKENS, 5)
    assert plan.layers[1].ids.meta["val"].shape == (TOKENS, TOP_K)


def test_width_is_limited_to_the_number_of_experts(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    gm = trace(plain_block)
    plan, _ = _predicted(gm, PassConfig(prefetch_width=99))
    ((_, ids, weights),) = plan.layers[0].predictions
    ids_value, weights_value = _run(gm, [ids, weights])
    assert ids_value.shape == weights_value.shape == (TOKENS, EXPERTS)


@pytest.mark.parametrize("width", [1, TOP_K])
def test_width_below_top_k_keeps_top_k(width: int) -> None:
    gm = trace(plain_block)
    plan, _ = _predicted(gm, PassConfig(prefetch_width=width))
    ((_, ids, _),) = plan.layers[0].predictions
    assert ids.meta["val"].shape == (TOKENS, TOP_K)


def test_widened_layer_in_between_keeps_its_own_top_k() -> None:
    gm = trace(plain_block)
    _predicted(gm, PassConfig(prefetch_width=5, lookahead=2))
    blends = calls(gm.graph, "blend_default_vectors")
    assert [node.args[0].meta["val"].shape[1] for node in blends] == [TOP_K, TOP_K]


def test_state_of_another_dtype_gives_a_reason() -> None:
    def wide(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        return plain_block(r.double(), gate.double(), layer)

    gm = trace([plain_block, wide])
    before = len(gm.graph.nodes)
    plan, report = _predicted(gm)
    assert report.matches == 0
    assert "float64, and the state to predict it from is" in report.skipped[1]
    assert not plan.layers[0].predictions
    assert len(gm.graph.nodes) - before == 2, "only the default vectors were inserted"


def test_router_that_reads_the_experts_otherwise_gives_a_reason() -> None:
    def model(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        ids, weights = route(x, gate)
        y = OPS.experts(x, ids, weights, 0, 0)
        r = attention(r + y)
        x = norm(r) + 0.1 * y
        ids, weights = route(x, gate)
        return r + OPS.experts(x, ids, weights, 0, 1)

    _, report = _predicted(trace(model, layers=1))
    assert report.matches == 0
    assert "its router cannot run ahead" in report.skipped[1]
    assert "which depends on these experts" in report.skipped[1]


def test_control_reads_the_true_state(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    config = PassConfig(control=True)
    gm = trace(plain_block)
    plan, report = _predicted(gm, config)
    assert report.matches == 2
    ((target, ids, weights),) = plan.layers[2].predictions
    assert target is plan.layers[2]
    found = _run(gm, [ids, weights, target.ids, target.weights])
    torch.testing.assert_close(found[:2], found[2:], rtol=0, atol=0)


def test_twice_is_once() -> None:
    gm = trace(plain_block)
    config = PassConfig()
    plan, _ = _predicted(gm, config)
    before = str(gm.graph)
    assert insert_lookahead_router(gm.graph, config, plan).matches == 0
    assert str(gm.graph) == before
