"""Every invariant, broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph, GraphModule

from specmoe_compile.errors import InvariantError
from specmoe_compile.passes.check_invariants import check_invariants, output_aliases
from specmoe_compile.passes.fx_utils import call_op
from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import EXPERTS, HIDDEN, OPS, TOKENS, calls, plain_block, trace


def _rewritten() -> GraphModule:
    gm = trace(plain_block)
    run_passes(gm, PassConfig(), check_each=True)
    return gm


def _drop_value(graph: Graph) -> None:
    del calls(graph, "start_prefetch")[0].meta["val"]


def _start_twice(graph: Graph) -> None:
    start = calls(graph, "start_prefetch")[0]
    with graph.inserting_after(start):
        call_op(graph, OPS.start_prefetch.default, start.args, like=start)


def _start_without_wait(graph: Graph) -> None:
    first, second = calls(graph, "start_prefetch")
    wait = calls(graph, "wait_prefetch")[1]
    wait.args = (calls(graph, "wait_prefetch")[0].args[0], *wait.args[1:])
    assert first is not second


def _wait_for_another_layer(graph: Graph) -> None:
    _, second, third = calls(graph, "wait_prefetch")
    first_ticket, second_ticket = second.args[0], third.args[0]
    second_ids, third_ids = second.args[1], third.args[1]
    start = calls(graph, "start_prefetch")[1]
    start.args = (*start.args[:3], 7, start.args[4])
    assert first_ticket is not second_ticket and second_ids is not third_ids


def _wait_twice(graph: Graph) -> None:
    wait = calls(graph, "wait_prefetch")[0]
    with graph.inserting_after(wait):
        call_op(graph, OPS.wait_prefetch.default, wait.args, like=wait)


def _run_without_waiting(graph: Graph) -> None:
    run = calls(graph, "run_resident_experts")[0]
    wait = run.args[3]
    run.args = (*run.args[:3], wait.args[0], *run.args[4:])  # type: ignore[union-attr]


def _correct_another_partial(graph: Graph) -> None:
    runs = calls(graph, "run_resident_experts")
    correct = calls(graph, "correct_experts")[1]
    correct.args = (runs[0], *correct.args[1:])


def _refill_before_last_use(graph: Graph) -> None:
    start = calls(graph, "start_prefetch")[0]
    wait = calls(graph, "wait_prefetch")[1]
    ticket = wait.args[0]
    run = calls(graph, "run_resident_experts")[1]
    run.prepend(start)
    assert ticket is start
    placeholder = calls(graph, "wait_prefetch")[0].args[0]
    for user in list(start.users):
        user.replace_input_with(start, placeholder)  # type: ignore[arg-type]


def _run_whole_as_well(graph: Graph) -> None:
    correct = calls(graph, "correct_experts")[0]
    _, x, ids, weights, _, session, layer = correct.args
    with graph.inserting_after(correct):
        call_op(graph, OPS.experts.default, (x, ids, weights, session, layer), like=correct)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_drop_value, "has no fake value"),
        (_start_twice, "is prefetched 2 times"),
        (_start_without_wait, "has 0 waits"),
        (_wait_for_another_layer, "waits for the ticket of another layer"),
        (_wait_twice, "has two waits|of its layer, expected exactly one"),
        (_run_without_waiting, "expected exactly one|runs without waiting"),
        (_correct_another_partial, "does not correct"),
        (_refill_before_last_use, "has 0 waits|refills slots"),
        (_run_whole_as_well, "that is also split"),
    ],
)
def test_broken_graph_is_refused(break_it: Callable[[Graph], None], message: str) -> None:
    gm = _rewritten()
    check_invariants(gm.graph)
    break_it(gm.graph)
    with pytest.raises(InvariantError, match=message):
        check_invariants(gm.graph)


def test_assertions_need_no_value() -> None:
    """`torch.export` asserts the dtype of what is converted; such a call returns nothing."""

    class Layers(torch.nn.Module):
        def forward(self, r: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            for layer in range(3):
                r = plain_block(r.to(torch.float64).float(), gate, layer)
            return r

    inputs = (torch.randn(TOKENS, HIDDEN), torch.randn(EXPERTS, HIDDEN))
    program = torch.export.export(Layers(), inputs).run_decompositions({})
    graph = program.graph_module.graph
    asserted = graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    )
    assert asserted and all("val" not in node.meta for node in asserted)
    report = run_passes(graph, PassConfig(), check_each=True)
    assert report.reason is None
    assert len(calls(graph, "correct_experts")) == 3


def test_new_alias_of_an_input_is_refused() -> None:
    gm = _rewritten()
    before = output_aliases(gm.graph)
    assert before == [None]
    (output,) = gm.graph.find_nodes(op="output")
    placeholder = next(iter(gm.graph.find_nodes(op="placeholder")))
    with gm.graph.inserting_before(output):
        view = call_op(gm.graph, torch.ops.aten.alias.default, (placeholder,), like=placeholder)
    output.args = (view,)
    with pytest.raises(InvariantError, match="outputs alias the inputs"):
        check_invariants(gm.graph, before)


def test_use_before_definition_is_refused() -> None:
    gm = _rewritten()
    start = calls(gm.graph, "start_prefetch")[0]
    next(iter(gm.graph.nodes)).append(start)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        check_invariants(gm.graph)
