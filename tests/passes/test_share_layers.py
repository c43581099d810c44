"""Equal layers become one subgraph, which computes and writes what the layers did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import specmoe_compile
from specmoe_compile.passes import manager
from specmoe_compile.passes.report import PassReport
from specmoe_compile.passes.share_layers import share_layers
from tests.helpers import greedy, prompts, tiny_qwen3_moe
from tests.passes.graphs import HIDDEN, OPS, use_session

LAYERS, TOKENS, KEPT = 4, 3, 5
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _layer(h: Tensor, weight: Tensor, cache: Tensor, at: Tensor, layer: int) -> tuple[Any, Any]:
    """Some fifteen calls, a write into a cache, and what the experts and the next layer take."""
    r = h * torch.rsqrt((h * h).mean(dim=1, keepdim=True) + 1e-6) + h
    q = torch.mm(torch.sin(r) * torch.cos(r), weight.t())
    kept = torch.ops.aten.index_put.default(cache, [at], torch.tanh(q)[:1])
    torch.ops.aten.copy_.default(cache, kept)
    r = r + torch.softmax(q @ kept.t(), dim=-1) @ kept
    return r, torch.relu(r).view(TOKENS, HIDDEN)


def _stack(layer_of: Layer) -> Callable[..., Tensor]:
    def body(h: Tensor, at: Tensor, *given: Tensor) -> Tensor:
        ids = torch.zeros(TOKENS, 2, dtype=torch.int64)
        for layer, (weight, cache) in enumerate(zip(given[::2], given[1::2], strict=True)):
            r, x = layer_of(h, weight, cache, at, layer)
            h = r + OPS.experts(x, ids, torch.ones(TOKENS, 2), 0, layer)
        return h

    return body


def _given() -> list[Tensor]:
    torch.manual_seed(0)
    pairs = [(torch.randn(HIDDEN, HIDDEN), torch.randn(KEPT, HIDDEN)) for _ in range(LAYERS)]
    rest = [each for pair in pairs for each in pair]
    return [torch.randn(TOKENS, HIDDEN), torch.tensor([2]), *rest]


def _traced(layer_of: Layer, mode: str = "fake") -> GraphModule:
    gm = make_fx(_stack(layer_of), tracing_mode=mode)(*_given())
    gm.graph.eliminate_dead_code()
    return gm


def _shared(gm: GraphModule) -> list[Node]:
    target = torch.ops.higher_order.invoke_subgraph
    return list(gm.graph.find_nodes(op="call_function", target=target))


def _results(gm: GraphModule) -> list[Tensor]:
    """What a graph returns, and its inputs afterwards."""
    given = _given()
    with torch.no_grad():
        return [gm(*given), *given]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> None:
    use_session(monkeypatch)


@pytest.mark.usefixtures("session")
def test_layers_after_the_first_call_one_subgraph_with_the_same_results() -> None:
    want = _results(_traced(_layer))
    gm = _traced(_layer)
    assert share_layers(gm.graph).matches == LAYERS - 1
    gm.graph.lint()
    gm.recompile()
    calls = _shared(gm)
    assert len(calls) == LAYERS - 1
    assert len({call.args[1] for call in calls}) == 1, "layers 1 to 3 are of one form"
    for got, wanted in zip(_results(gm), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("session")
def test_what_a_subgraph_writes_is_told_and_nothing_whole_is_handed_out() -> None:
    gm = _traced(_layer)
    share_layers(gm.graph)
    (told,) = gm.graph.find_nodes(op="call_function", target=OPS.written.default)
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    caches = inputs[3::2]
    assert told.args == (caches[1:],), "the first layer writes its cache itself"
    for call in _shared(gm):
        shapes = [tuple(value.shape) for value in call.meta["val"]]
        assert (KEPT, HIDDEN) not in shapes


@pytest.mark.usefixtures("session")
def test_no_view_crosses_the_border() -> None:
    gm = _traced(_layer)
    share_layers(gm.graph)
    for call in _shared(gm):
        subgraph = getattr(gm, str(call.args[1]))
        (output,) = subgraph.graph.find_nodes(op="output")
        handed_out = output.all_input_nodes
        assert handed_out and not any(getattr(n.target, "is_view", False) for n in handed_out)
        given = [node for node in call.args[2:] if isinstance(node, Node)]
        assert not any(getattr(node.target, "is_view", False) for node in given)


def _own_factor(h: Tensor, weight: Tensor, cache: Tensor, at: Tensor, layer: int) -> Any:
    return _layer(h * (1.0 + layer), weight, cache, at, layer)


def _own_dtype(h: Tensor, weight: Tensor, cache: Tensor, at: Tensor, layer: int) -> Any:
    r, x = _layer(h, weight, cache, at, layer)
    return r, x.to(torch.float64).to(torch.float32) if layer % 2 else x.sin()


@pytest.mark.usefixtures("session")
def test_layers_that_differ_stay_apart() -> None:
    assert share_layers(_traced(_own_factor).graph).matches == 0
    gm = _traced(_own_dtype)
    want = _results(_traced(_own_dtype))
    share_layers(gm.graph)
    gm.recompile()
    names = [call.args[1] for call in _shared(gm)]
    assert names == [] or len(set(names)) < len(names)
    for got, wanted in zip(_results(gm), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("session")
def test_layers_whose_weights_are_not_aligned_stay_apart_from_those_whose_are() -> None:
    given = _given()
    given[-2] = torch.randn(HIDDEN * HIDDEN + 1)[1:].view(HIDDEN, HIDDEN)
    gm = make_fx(_stack(_layer), tracing_mode="fake")(*given)
    assert share_layers(gm.graph).matches == LAYERS - 2, "the last layer is left out"


@pytest.mark.usefixtures("session")
def test_open_shapes_are_left_alone() -> None:
    gm = _traced(_layer, "symbolic")
    before = str(gm.graph)
    assert share_layers(gm.graph).matches == 0 and str(gm.graph) == before


@pytest.mark.usefixtures("session")
def test_a_number_that_no_shape_depends_on_does_not_matter() -> None:
    """As the count that a cache with a window keeps in Python."""
    gm = _traced(_layer)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        number = gm.graph.placeholder("number")
    number.meta["val"] = ShapeEnv().create_unbacked_symint()
    assert share_layers(gm.graph).matches == LAYERS - 1


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("before", [True, False])
def test_a_cache_that_others_read_stays_where_it_is(before: bool) -> None:
    def body(h: Tensor, at: Tensor, *given: Tensor) -> Tensor:
        h = h + sum(cache.sum() for cache in given[1::2]) if before else h
        h = _stack(_layer)(h, at, *given)
        return h if before else h + sum(cache.sum() for cache in given[1::2])

    want, gm = (make_fx(body, tracing_mode="fake")(*_given()) for _ in range(2))
    assert share_layers(gm.graph).matches == 0
    gm.recompile()
    for got, wanted in zip(_results(gm), _results(want), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("session")
def test_a_layer_reads_what_another_writes_at_the_end_before_it_is_written() -> None:
    """Where AOTAutograd puts all writes: behind everything else."""

    def body(h: Tensor, at: Tensor, *given: Tensor) -> Tensor:
        following, writes = at + 1, []
        for layer, (weight, cache) in enumerate(zip(given[::2], given[1::2], strict=True)):
            r = torch.sin(h) * torch.rsqrt((h * h).mean(dim=1, keepdim=True) + 1e-6)
            q = torch.mm(torch.cos(r), weight.t())
            kept = torch.ops.aten.index_put.default(cache, [at], torch.tanh(q)[:1])
            writes.append((cache, kept))
            r = r + torch.softmax(q @ kept.t(), dim=-1) @ kept
            ids = torch.zeros(TOKENS, 2, dtype=torch.int64)
            h = r + OPS.experts(torch.relu(r), ids, torch.ones(TOKENS, 2), 0, layer)
        for target, value in [(at, following), *writes]:
            torch.ops.aten.copy_.default(target, value)
        return h

    want, gm = (make_fx(body, tracing_mode="fake")(*_given()) for _ in range(2))
    assert share_layers(gm.graph).matches == LAYERS - 1
    stable_topological_sort(gm.graph)
    gm.recompile()
    for got, wanted in zip(_results(gm), _results(want), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "options", [{"prefetch": False}, pytest.param({"prefetch": True}, marks=pytest.mark.slow)]
)
def test_tokens_of_shared_layers_are_the_models(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[PassReport] = []

    def noted(graph: Graph) -> PassReport:
        reports.append(share_layers(graph))
        return reports[-1]

    monkeypatch.setattr(manager, "share_layers", noted)
    model = specmoe_compile.offload(
        tiny_qwen3_moe(layers=4), store="disk", store_dir=tmp_path / "store", expert_cache="50%"
    )
    torch._dynamo.reset()
    run: Any = torch.compile(model, backend="specmoe", options={"share_layers": True, **options})
    with torch._inductor.config.patch(force_disable_caches=True):
        tokens = greedy(run, prompts(1, 20), 12, cache_implementation="static")
    assert torch.equal(tokens, greedy(tiny_qwen3_moe(layers=4), prompts(1, 20), 12))
    assert max(report.matches for report in reports) == 3
