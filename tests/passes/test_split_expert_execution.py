"""Prefetch and split execution: arguments, control edges, order of execution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specmoe_compile.passes.insert_default_vectors import insert_default_vectors
from specmoe_compile.passes.insert_expert_prefetch import insert_expert_prefetch
from specmoe_compile.passes.insert_lookahead_router import insert_lookahead_router
from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.split_expert_execution import NO_TICKET, split_expert_execution
from tests.passes.graphs import calls, find, inputs, plain_block, trace, use_session


def _prefetched(config: PassConfig, layers: int = 3) -> Any:
    gm = trace(plain_block, layers=layers)
    plan = find(gm, config)
    insert_default_vectors(gm.graph, config, plan)
    insert_lookahead_router(gm.graph, config, plan)
    report = insert_expert_prefetch(gm.graph, config, plan)
    return gm, plan, report


def test_prefetch_reads_the_prediction_and_names_the_target() -> None:
    gm, plan, report = _prefetched(PassConfig())
    assert report.matches == 2
    starts = calls(gm.graph, "start_prefetch")
    for start, source, target in zip(starts, plan.layers, plan.layers[1:], strict=False):
        ((_, ids, weights),) = source.predictions
        assert start.args == (ids, weights, 0, target.index, [])
        assert start < source.experts
        assert start.meta["val"].shape == (1,) and start.meta["val"].dtype == torch.int64


def test_prefetch_twice_is_once() -> None:
    gm, plan, _ = _prefetched(PassConfig())
    before = str(gm.graph)
    assert insert_expert_prefetch(gm.graph, PassConfig(), plan).matches == 0
    assert str(gm.graph) == before


def test_split_passes_tickets_states_and_control_edges() -> None:
    gm, plan, _ = _prefetched(PassConfig())
    report = split_expert_execution(gm.graph, PassConfig(), plan)
    assert report.matches == 3 and not calls(gm.graph, "experts")
    starts = calls(gm.graph, "start_prefetch")
    waits = calls(gm.graph, "wait_prefetch")
    runs = calls(gm.graph, "run_resident_experts")
    corrects = calls(gm.graph, "correct_experts")
    for position, layer in enumerate(plan.layers):
        wait, run, correct = waits[position], runs[position], corrects[position]
        here = starts[position : position + 1]
        ticket = wait.args[0]
        if position == 0:
            assert ticket.target is torch.ops.aten.full.default
            assert ticket.args == ([1], NO_TICKET)
        else:
            assert ticket is starts[position - 1]
        assert wait.args[1:] == (layer.ids, 0, layer.index)
        assert run.args == (layer.x, layer.ids, layer.weights, wait, 0, layer.index, here)
        assert correct.args == (run, layer.x, layer.ids, layer.weights, wait, 0, layer.index)
        for start in here:
            assert start.args[4] == [wait]


def test_split_twice_is_once() -> None:
    gm, plan, _ = _prefetched(PassConfig())
    split_expert_execution(gm.graph, PassConfig(), plan)
    before = str(gm.graph)
    assert split_expert_execution(gm.graph, PassConfig(), plan).matches == 0
    assert str(gm.graph) == before


def test_layer_without_prefetch_on_either_side_is_left_whole() -> None:
    gm, plan, _ = _prefetched(PassConfig(skip_layers=(1, 2)), layers=4)
    report = split_expert_execution(gm.graph, PassConfig(), plan)
    assert report.matches == 2
    assert [node.args[4] for node in calls(gm.graph, "experts")] == [0, 1]


@pytest.mark.parametrize(
    "config",
    [
        PassConfig(),
        PassConfig(lookahead=2),
        PassConfig(prefetch_width=4),
        PassConfig(skip_layers=(2,)),
        PassConfig(control=True),
        PassConfig(conditional=True),
        PassConfig(conditional=True, lookahead=2),
        PassConfig(conditional=True, control=True),
    ],
)
def test_values_and_order_of_execution(monkeypatch: Any, config: PassConfig) -> None:
    session = use_session(monkeypatch)
    gm = trace(plain_block, layers=4)
    want = gm(*inputs(4))
    session.events.clear()
    report = run_passes(gm, config, check_each=True)
    gm.recompile()
    torch.testing.assert_close(gm(*inputs(4)), want, rtol=0, atol=0)
    assert report.reason is None
    for layer in range(1, 4):
        if layer in config.skip_layers:
            assert ("start", layer) not in session.events
            continue
        source = layer if config.control else max(0, layer - config.lookahead)
        assert session.at("start", layer) < session.at("wait", layer) < session.at("run", layer)
        if not config.control:
            assert session.at("wait", source) < session.at("start", layer)
            assert session.at("start", layer) < session.at("run", source)
    if config.control:
        assert session.recall == {1: [1.0], 2: [1.0], 3: [1.0]}
