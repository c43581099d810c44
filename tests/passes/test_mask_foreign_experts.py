"""Which dispatches of a rank say in the graph whose experts they ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import HIDDEN, calls, inputs, plain_block, route, trace, use_session

TOKEN = torch.linspace(-1.0, 1.0, HIDDEN).view(1, HIDDEN)
OTHERS = int(route(TOKEN, inputs()[1])[0][0, 0])
"""One of the ids that a router chooses, so that there is something to mask."""


def traced() -> GraphModule:
    return trace(plain_block, r=TOKEN)


def test_the_last_layer_counts_for_all(monkeypatch: Any) -> None:
    session: Any = use_session(monkeypatch)
    counts: list[tuple[int, list[int]]] = []
    asked: list[Tensor] = []

    def run_own(layer: int, x: Tensor, slots: Tensor, weights: Tensor, counted: Any) -> Any:
        counts.append((layer, list(counted)))
        asked.append(slots)
        assert all(torch.equal(counted[index], asked[index]) for index in counted)
        return session.experts(layer, x, torch.where(slots < 0, OTHERS, slots), weights)

    session.run_own_experts = run_own
    expected = traced()(*inputs(r=TOKEN))
    gm = traced()
    config = PassConfig(prefetch=False, foreign_ids=((0, OTHERS), (1, OTHERS), (2, OTHERS)))
    report = run_passes(gm, config, check_each=True)
    assert report.matches["mask_foreign_experts"] == len(calls(gm.graph, "run_own_experts")) == 3
    gm.recompile()
    torch.testing.assert_close(gm(*inputs(r=TOKEN)), expected, rtol=0, atol=0)
    assert counts == [(0, []), (1, []), (2, [0, 1, 2])]
    slots = torch.cat(asked)
    assert bool((slots != OTHERS).all()) and bool((slots == -1).any())
    before = str(gm.graph)
    run_passes(gm, config)
    assert str(gm.graph) == before, "twice is once"


def test_other_layers_and_steps_of_several_tokens_stay() -> None:
    gm = traced()
    run_passes(gm, PassConfig(prefetch=False, foreign_ids=((1, OTHERS),)))
    (node,) = calls(gm.graph, "run_own_experts")
    assert list(node.args[4:]) == [1, [node.args[1]], [1]]
    several = trace(plain_block)
    run_passes(several, PassConfig(prefetch=False, foreign_ids=((0, OTHERS), (1, OTHERS))))
    assert not calls(several.graph, "run_own_experts")


def test_a_layer_that_runs_twice_plans_as_before() -> None:
    def again(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        return plain_block(r, gate, 0)

    gm = trace(again, r=TOKEN)
    run_passes(gm, PassConfig(prefetch=False, foreign_ids=((0, OTHERS),)))
    assert not calls(gm.graph, "run_own_experts")


def test_layers_beside_it_are_predicted() -> None:
    config = PassConfig(resident_layers=(2,), foreign_ids=((2, OTHERS),))
    report = run_passes(traced(), config, check_each=True)
    assert report.matches["mask_foreign_experts"] == 1
    assert report.matches["split_expert_execution"] == 2
