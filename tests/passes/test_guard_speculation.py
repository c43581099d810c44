"""Speculation in branches: what moves into them, both answers when they run, and the invariants."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch._inductor import inductor_prims

from specmoe_compile.errors import InvariantError
from specmoe_compile.options import Lowering
from specmoe_compile.passes.check_invariants import check_invariants
from specmoe_compile.passes.manager import SpeculationPass, run_passes
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from tests.passes.graphs import (
    EXPERTS,
    HIDDEN,
    OPS,
    attention,
    calls,
    inputs,
    plain_block,
    trace,
    use_session,
)
from tests.passes.lowering import compile_with

GUARDED = PassConfig(conditional=True)
SPLIT_OPS = ("wait_prefetch", "start_prefetch", "run_resident_experts", "correct_experts")


def _conditions(gm: Any) -> list[Any]:
    return [n for n in gm.graph.nodes if n.target is torch.ops.higher_order.cond]


def _branches(gm: Any, condition: Any) -> list[Any]:
    return [getattr(gm, node.target).graph for node in condition.args[1:3]]


def test_one_branch_holds_the_split_layer_and_one_its_experts() -> None:
    gm = trace(plain_block, layers=3)
    plan = SpeculationPlan()
    run_passes(gm, GUARDED, check_each=True, plan=plan)
    conditions = _conditions(gm)
    assert len(conditions) == 3
    assert not any(calls(gm.graph, name) for name in (*SPLIT_OPS, "blend_default_vectors"))
    (planned,) = calls(gm.graph, "plan_step")
    assert planned.args[1:] == (0, [0, 1, 2], [0, 1, 1, 2])
    for layer, condition in zip(plan.layers, conditions, strict=True):
        assert condition.args[0].args == (planned, 0, layer.index)
        speculate, demand = _branches(gm, condition)
        starts = 1 if layer.index < 2 else 0
        assert [len(calls(speculate, name)) for name in SPLIT_OPS] == [1, starts, 1, 1]
        assert len(calls(speculate, "blend_default_vectors")) == starts
        (experts,) = calls(demand, "experts")
        assert experts.args[3:] == (0, layer.index)
        for name, number in (("topk", starts), ("full", 1 if layer.index == 0 else 0)):
            found = [n for n in speculate.nodes if name in str(n.target)]
            assert len(found) == number, "the router itself stays outside, its clone does not"


def test_without_the_option_or_in_control_mode_nothing_is_guarded() -> None:
    for config in (PassConfig(), PassConfig(conditional=True, control=True)):
        gm = trace(plain_block, layers=3)
        run_passes(gm, config)
        assert not _conditions(gm) and not calls(gm.graph, "plan_step")


@pytest.mark.parametrize("unwanted", [set(), {2}, {1, 3}, {1, 2, 3}])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_what_is_not_wanted_is_not_computed(
    monkeypatch: Any, unwanted: set[int], lookahead: int
) -> None:
    session = use_session(monkeypatch)
    gm = trace(plain_block, layers=4)
    want = gm(*inputs(4))
    session.events.clear()
    session.unwanted = unwanted
    run_passes(gm, PassConfig(conditional=True, lookahead=lookahead))
    gm.recompile()
    torch.testing.assert_close(gm(*inputs(4)), want, rtol=0, atol=0)
    wanted = {1, 2, 3} - unwanted
    sources = {max(0, layer - lookahead) for layer in wanted}
    split = {layer for name, layer in session.events if name == "correct"}
    assert split == wanted | sources
    assert {layer for name, layer in session.events if name == "experts"} == set(range(4)) - split
    for layer in wanted:
        source = max(0, layer - lookahead)
        assert session.at("wait", source) < session.at("start", layer) < session.at("run", source)
        assert session.at("start", layer) < session.at("wait", layer)


class Transposed(torch.nn.Module):
    """Blocks whose residual is the transpose of what is computed, as behind a convolution."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.gates = torch.nn.Parameter(torch.randn(layers, EXPERTS, HIDDEN))

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        for layer, gate in enumerate(self.gates):
            r = torch.nn.functional.silu(attention(r).t().contiguous()).t() * 1.5
            r = plain_block(r, gate, layer)
        return r


@torch.no_grad()
@pytest.mark.parametrize("unwanted", [set(), {1, 2}], ids=["speculate", "demand"])
def test_inductor_takes_operands_that_are_not_contiguous(
    monkeypatch: Any, unwanted: set[int]
) -> None:
    session = use_session(monkeypatch)
    model, r = Transposed(3), inputs(3)[0]
    want = model(r)
    session.events.clear()
    session.unwanted = unwanted
    speculation = SpeculationPass(GUARDED)
    got = compile_with(model, speculation)(r)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert any(name == "correct" for name, _ in session.events) == (not unwanted)


def test_operands_are_contiguous_but_for_views_of_inputs() -> None:
    def transposed(r: torch.Tensor, gate: torch.Tensor, layer: int) -> torch.Tensor:
        return plain_block(r.t().contiguous().t() if layer == 1 else r, gate, layer)

    gm = trace(transposed, layers=3)
    run_passes(gm, GUARDED, check_each=True)
    views = 0
    for condition in _conditions(gm):
        speculate, demand = _branches(gm, condition)
        operands = [n for n in condition.args[3] if isinstance(n.meta["val"], torch.Tensor)]
        views += sum(not node.meta["val"].is_contiguous() for node in operands)
        for node in operands:
            assert node.meta["val"].is_contiguous() or node.args[0].op == "placeholder"
        for branch in (speculate, demand):
            inside = [n.meta["val"] for n in branch.find_nodes(op="placeholder")]
            outside = [n.meta["val"] for n in condition.args[3]]
            assert [v.stride() for v in inside] == [v.stride() for v in outside]
    assert views, "the routers of the lookahead are transposed views"


def test_a_graph_that_inductor_does_not_compile_pays_for_no_layout() -> None:
    for lowering in get_args(Lowering):
        gm = trace(plain_block, layers=3)
        run_passes(gm, PassConfig(conditional=True, lowering=lowering), check_each=True)
        settled = [n for n in gm.graph.nodes if n.target is inductor_prims.force_stride_order]
        assert bool(settled) == (lowering == "inductor")


def test_twice_is_once() -> None:
    gm = trace(plain_block, layers=3)
    run_passes(gm, GUARDED)
    before = str(gm.graph)
    run_passes(gm, GUARDED)
    assert str(gm.graph) == before


@pytest.mark.parametrize("broken", ["two waits", "other layer", "a ticket", "both speculate"])
def test_invariants_see_into_branches(broken: str) -> None:
    gm = trace(plain_block, layers=3)
    run_passes(gm, GUARDED)
    condition = _conditions(gm)[1]
    speculate, demand = _branches(gm, condition)
    if broken == "two waits":
        (wait,) = calls(speculate, "wait_prefetch")
        with speculate.inserting_after(wait):
            speculate.node_copy(wait).meta = wait.meta
    elif broken == "other layer":
        (experts,) = calls(demand, "experts")
        experts.args = (*experts.args[:4], 2)
    elif broken == "a ticket":
        (ticket,) = [n for n in demand.nodes if n.target is torch.ops.aten.full.default]
        ticket.args = ([1], 3)
    else:
        condition.args = (*condition.args[:2], condition.args[1], condition.args[3])
    with pytest.raises(InvariantError):
        check_invariants(gm.graph)


def test_invariants_accept_what_the_pass_made() -> None:
    gm = trace(plain_block, layers=3)
    run_passes(gm, GUARDED)
    check_invariants(gm.graph)
    assert OPS.experts.default in {
        n.target for c in _conditions(gm) for n in _branches(gm, c)[1].nodes
    }


def test_a_graph_with_constants_passes_the_invariants() -> None:
    def block(r: torch.Tensor, gate: torch.Tensor, layer: int) -> torch.Tensor:
        return plain_block(r, gate, layer) * torch.tensor([0.5])

    gm = trace(block, layers=2)
    assert gm.graph.find_nodes(op="get_attr"), "the test needs a constant"
    run_passes(gm, GUARDED, check_each=True)
    assert len(_conditions(gm)) == 2
