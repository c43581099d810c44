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
        assert correct.args == (run, layer.x, layer.ids, layer.weights, wait, 0, layer.index, [])
        for start in here:
            assert start.args[4] == [wait]


def test_experts_first_changes_the_control_edges_only() -> None:
    gm, plan, _ = _prefetched(PassConfig())
    split_expert_execution(gm.graph, PassConfig(experts_first=True), plan)
    runs, starts = calls(gm.graph, "run_resident_experts"), calls(gm.graph, "start_prefetch")
    waits, blends = calls(gm.graph, "wait_prefetch"), calls(gm.graph, "blend_default_vectors")
    assert len(starts) == len(blends) == 2
    for layer, wait, run in zip(plan.layers, waits, runs, strict=True):
        assert run.args == (layer.x, layer.ids, layer.weights, wait, 0, layer.index, [])
    corrects = calls(gm.graph, "correct_experts")
    assert [correct.args[7] for correct in corrects] == [[starts[0]], [starts[1]], []]
    for wait, run, blend, start in zip(waits, runs, blends, starts, strict=False):
        assert wait < run < blend < start
        assert blend.args[5] == [run] and start.args[4] == [wait, run]


@pytest.mark.parametrize("lookahead", [1, 2])
def test_inductor_issues_experts_before_what_predicts(monkeypatch: Any, lookahead: int) -> None:
    session = use_session(monkeypatch)
    gm = trace(plain_block, layers=4)
    want = gm(*inputs(4))
    config = PassConfig(experts_first=True, lookahead=lookahead)
    assert run_passes(gm, config, check_each=True).reason is None
    gm.recompile()
    compiled = torch._inductor.compile(gm, inputs(4))
    session.events.clear()
    torch.testing.assert_close(compiled(*inputs(4)), want)
    for layer in range(1, 4):
        source = max(0, layer - lookahead)
        assert session.at("wait", source) < session.at("run", source) < session.at("start", layer)
        assert session.at("start", layer) < session.at("correct", source)
        blends = [place for place, event in enumerate(session.events) if event == ("blend", source)]
        assert max(blends) > session.at("run", source)  # its own, not one for a layer before


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
        PassConfig(experts_first=True),
        PassConfig(experts_first=True, lookahead=2),
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
            first, second = ("run", source), ("start", layer)
            if not config.experts_first:
                first, second = second, first
            assert session.at(*first) < session.at(*second)
    if config.control:
        assert session.recall == {1: [1.0], 2: [1.0], 3: [1.0]}
