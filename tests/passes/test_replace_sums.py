"""Which all-reduces over ranks become one launch, and that compiled code holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from specmoe_compile.kernels.sum_ranks.inbox import MAX_BYTES
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.replace_sums import rank_groups, replace_sums

SUM = torch.ops.specmoe_kernels.sum_ranks.default


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    """The name of a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    dist.destroy_process_group()


def reduced(x: Tensor, group: str, kind: str = "sum") -> Tensor:
    ops: Any = torch.ops._c10d_functional
    total: Tensor = ops.wait_tensor(ops.all_reduce(x, kind, group))
    return total


def traced(function: Callable[..., Tensor], *inputs: Tensor, mode: str = "fake") -> GraphModule:
    return make_fx(function, tracing_mode=mode)(*inputs)


def counted(gm: GraphModule) -> int:
    return len(list(gm.graph.find_nodes(op="call_function", target=SUM)))


def replaced(gm: GraphModule, *groups: str, sums: Any = "one_shot") -> int:
    before = counted(gm)
    report = replace_sums(gm.graph, PassConfig(inbox_groups=groups, sums=sums), SpeculationPlan())
    gm.graph.lint()
    assert counted(gm) == before + report.matches
    return report.matches


def test_a_sum_and_its_wait_become_one_call(group: str) -> None:
    x = torch.randn(1, 1, 64, dtype=torch.bfloat16)
    gm = traced(lambda x: reduced(x * 2, group) + reduced(x, group), x)
    assert replaced(gm, group) == 2
    assert replaced(gm, group) == 0, "twice is once"
    assert "c10d" not in str(gm.graph)
    gm.recompile()
    assert torch.equal(gm(x), x * 2 + x)
    for node in gm.graph.find_nodes(op="call_function", target=SUM):
        assert node.meta["val"].shape == x.shape and node.meta["val"].dtype == x.dtype


@pytest.mark.parametrize(("dtype", "taken"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_by_itself_it_takes_numbers_of_16_bits(group: str, dtype: torch.dtype, taken: int) -> None:
    gm = traced(lambda x: reduced(x, group), torch.zeros(4, 8, dtype=dtype))
    assert replaced(gm, group, sums="auto") == taken


@pytest.mark.parametrize(
    ("why", "x", "kind"),
    [
        ("large", torch.zeros(MAX_BYTES // 4 + 1), "sum"),
        ("odd", torch.zeros(3, dtype=torch.bfloat16), "sum"),
        ("integers", torch.zeros(4, dtype=torch.int64), "sum"),
        ("no sum", torch.zeros(4), "max"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_reductions_stay(group: str, why: str, x: Tensor, kind: str) -> None:
    assert replaced(traced(lambda x: reduced(x, group, kind), x), group) == 0


def test_sums_of_groups_without_inboxes_and_of_open_sizes_stay(group: str) -> None:
    gm = traced(lambda x: reduced(x, group), torch.zeros(4, 8))
    assert replaced(gm) == 0 and replaced(gm, "another") == 0
    symbolic = traced(lambda x: reduced(x, group), torch.zeros(4, 8), mode="symbolic")
    assert replaced(symbolic, group) == 0


def test_a_sum_that_is_read_before_its_wait_stays(group: str) -> None:
    def early(x: Tensor) -> Tensor:
        ops: Any = torch.ops._c10d_functional
        total = ops.all_reduce(x, "sum", group)
        return ops.wait_tensor(total) + total

    assert replaced(traced(early, torch.zeros(4)), group) == 0


def test_groups_are_found_in_a_graph_of_dynamo(group: str) -> None:
    found = []

    def keep(gm: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append((rank_groups(gm, widest=4), rank_groups(gm, widest=2)))
        return gm.forward

    def function(x: Tensor) -> Tensor:
        y = x + 1
        dist.all_reduce(y)
        return y * 2

    compiled = torch.compile(function, backend=keep, fullgraph=True)
    assert torch.equal(compiled(torch.ones(4)), torch.full((4,), 4.0))
    assert found == [((group,), ())], "they are of four bytes"


class Replacing(CustomGraphPass):
    """`replace_sums` alone, as Inductor calls the passes."""

    def __init__(self, group: str) -> None:
        self._group = group

    def __call__(self, graph: Graph) -> None:
        replace_sums(
            graph, PassConfig(inbox_groups=(self._group,), sums="one_shot"), SpeculationPlan()
        )

    def uuid(self) -> None:
        return None


@pytest.mark.parametrize("ours", [True, False])
def test_code_of_inductor_holds_it(group: str, ours: bool) -> None:
    def function(x: Tensor) -> Tensor:
        y = x.relu()
        dist.all_reduce(y)
        return y * 2

    patches = {"post_grad_custom_pre_pass": Replacing(group)} if ours else {}

    def backend(gm: GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx(gm, inputs, config_patches={**patches, "force_disable_caches": True})

    x = torch.randn(1, 64)
    with torch.no_grad():
        out, codes = run_and_get_code(torch.compile(function, backend=backend, fullgraph=True), x)
    code = "".join(codes)
    assert torch.equal(out, x.relu() * 2)
    assert ("sum_ranks.default(" in code) == ours and ("all_reduce_" in code) == (not ours)
