"""Which `topk` becomes one launch on a GPU, and that it chooses the same experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from specmoe_compile.passes import replace_top_k as module
from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import inputs, plain_block, trace, use_session


def _top_ks(gm: GraphModule) -> list[Node]:
    target = torch.ops.specmoe_kernels.top_k.default
    return list(gm.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (PassConfig(), 5),
        (PassConfig(prefetch_width=5), 5),
        (PassConfig(control=True), 5),
        (PassConfig(prefetch=False), 3),
    ],
)
def test_routers_and_their_clones_choose_the_same_experts(
    monkeypatch: Any, config: PassConfig, count: int
) -> None:
    found = []
    for is_small in (False, True):
        session = use_session(monkeypatch)
        # On a GPU it says so of this graph's topk: tests/runtime/cuda/test_fake_device.py.
        monkeypatch.setattr(module, "_is_small", lambda top_k, answer=is_small: answer)
        gm = trace(plain_block)
        report = run_passes(gm, config, check_each=True)
        assert report.matches["replace_top_k"] == len(_top_ks(gm)) == (count if is_small else 0)
        gm.recompile()
        found.append((gm(*inputs()), session.predicted))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_top_k_on_the_cpu_is_not_ours() -> None:
    gm = trace(plain_block)
    run_passes(gm, PassConfig())
    assert not _top_ks(gm)


@pytest.mark.parametrize(
    ("shape", "arguments", "named", "ours"),
    [
        ((2, 64), (8,), {}, True),
        ((2, 64), (8, 1, True, False), {}, True),
        ((2, 64), (), {"k": 8, "dim": -1}, True),
        ((2, 64), (8,), {"largest": False}, False),
        ((2, 64), (2, 0), {}, False),
        ((2, 64), (2,), {"dim": 0}, False),
        ((2, 64), (40,), {}, False),
        ((2, 600), (8,), {}, False),
        ((2, 4, 64), (8,), {}, False),
    ],
)
def test_which_top_k_on_a_gpu_is_ours(
    shape: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any], ours: bool
) -> None:
    graph = Graph()
    scores = graph.placeholder("scores")
    with FakeTensorMode():
        scores.meta["val"] = torch.empty(shape, device="cuda")
    node = graph.call_function(torch.ops.aten.topk.default, (scores, *arguments), named)
    assert module._is_small(node) == ours
