"""The lookahead in a branch: what moves into it, what stays, and both answers when it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specmoe_compile.errors import InvariantError
from specmoe_compile.passes.check_invariants import check_invariants
from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.split_expert_execution import NO_TICKET
from tests.passes.graphs import OPS, calls, inputs, plain_block, trace, use_session

GUARDED = PassConfig(conditional=True)


def _conditions(gm: Any) -> list[Any]:
    return [n for n in gm.graph.nodes if n.target is torch.ops.higher_order.cond]


def test_the_branch_holds_the_prefetch_and_what_leads_to_it() -> None:
    gm = trace(plain_block, layers=3)
    plan = SpeculationPlan()
    run_passes(gm, GUARDED, check_each=True, plan=plan)
    conditions = _conditions(gm)
    assert len(conditions) == 2
    assert not calls(gm.graph, "blend_default_vectors") and not calls(gm.graph, "start_prefetch")
    waits = calls(gm.graph, "wait_prefetch")
    for wait, target, condition in zip(waits, plan.layers[1:], conditions, strict=False):
        assert wait.args[4] == [target.index]
        assert target.ticket.args == (condition, 0)
        _, lookahead, nothing, operands = condition.args
        assert wait in operands, "its state, which the prefetch comes after"
        branch = getattr(gm, lookahead.target).graph
        (start,) = calls(branch, "start_prefetch")
        assert len(calls(branch, "blend_default_vectors")) == 1 and start.args[2:4] == (
            0,
            target.index,
        )
        assert len(operands) == len([n for n in branch.nodes if n.op == "placeholder"])
        (full,) = [n for n in getattr(gm, nothing.target).graph.nodes if n.op == "call_function"]
        assert full.args == ([1], NO_TICKET)


def test_control_mode_is_not_guarded() -> None:
    gm = trace(plain_block, layers=3)
    run_passes(gm, PassConfig(conditional=True, control=True))
    assert not _conditions(gm)


def test_without_the_option_nothing_is_guarded() -> None:
    gm = trace(plain_block, layers=3)
    run_passes(gm, PassConfig())
    assert not _conditions(gm)


@pytest.mark.parametrize("unwanted", [set(), {2}, {1, 2, 3}])
def test_what_is_not_wanted_is_not_computed(monkeypatch: Any, unwanted: set[int]) -> None:
    session = use_session(monkeypatch)
    gm = trace(plain_block, layers=4)
    want = gm(*inputs(4))
    session.events.clear()
    session.unwanted = unwanted
    run_passes(gm, GUARDED)
    gm.recompile()
    torch.testing.assert_close(gm(*inputs(4)), want, rtol=0, atol=0)
    blended = {layer for name, layer in session.events if name == "blend"}
    assert blended == {layer - 1 for layer in (1, 2, 3) if layer not in unwanted}
    assert {layer for name, layer in session.events if name == "start"} == {1, 2, 3} - unwanted
    for layer in {1, 2, 3} - unwanted:
        assert session.at("wait", layer - 1) < session.at("start", layer)
        assert session.at("start", layer) < session.at("run", layer - 1)


def test_twice_is_once() -> None:
    gm = trace(plain_block, layers=3)
    run_passes(gm, GUARDED)
    before = str(gm.graph)
    run_passes(gm, GUARDED)
    assert str(gm.graph) == before


@pytest.mark.parametrize("broken", ["two waits", "ticket kept", "both branches"])
def test_invariants_see_into_branches(broken: str) -> None:
    gm = trace(plain_block, layers=3)
    plan = SpeculationPlan()
    run_passes(gm, GUARDED, plan=plan)
    ticket = plan.layers[1].ticket
    condition = ticket.args[0]
    if broken == "two waits":
        (wait,) = [n for n in ticket.users if n.target is OPS.wait_prefetch.default]
        with gm.graph.inserting_after(wait):
            gm.graph.node_copy(wait).meta = wait.meta
    elif broken == "ticket kept":
        branch = getattr(gm, condition.args[1].target).graph
        (output,) = branch.find_nodes(op="output")
        output.args = ((branch.find_nodes(op="placeholder")[0],),)
    else:
        condition.args = (
            condition.args[0],
            condition.args[1],
            *condition.args[1:2],
            condition.args[3],
        )
    with pytest.raises(InvariantError):
        check_invariants(gm.graph)
