"""Which products become calls of the engine, and that they stay the same products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from specmoe_compile.kernels.products.op import MAX_OUTPUTS
from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import HIDDEN, OPS, calls, inputs, plain_block, trace, use_session

ON_GPU = torch.ops.specmoe_kernels.products.default
MULTIPLIES = PassConfig(multiplies=True, prefetch=False)


def _routing(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2)


def _graph(body: Any, *given: Tensor, mode: str = "fake") -> GraphModule:
    return make_fx(body, tracing_mode=mode)(*given)


def _merged(gm: GraphModule) -> list[Node]:
    return calls(gm.graph, "products")


def _layer(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Products of one input, and a layer of experts that says whose session it is."""
    outs = [torch.ops.aten.mm.default(x, w.t()) for w in weights]
    ids, chosen = _routing(x.shape[0])
    return [*outs, OPS.experts(x, ids, chosen, 7, 0)]


def _given(tokens: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, HIDDEN).to(dtype) for size in (tokens, 5, 7, 4)]


def test_products_of_one_input_are_one_call_with_the_same_results(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    given = _given()
    gm = _graph(_layer, *given)
    want = gm(*given)
    report = run_passes(gm, MULTIPLIES, check_each=True)
    assert report.matches["merge_products"] == 3
    (merged,) = _merged(gm)
    assert len(merged.args[1]) == 3 and merged.args[2:] == ([], 7)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    gm.recompile()
    for got, wanted in zip(gm(*given), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_bias_goes_along_and_apart_from_products_without(monkeypatch: Any) -> None:
    use_session(monkeypatch)

    def body(x: Tensor, w: Tensor, other: Tensor, b: Tensor) -> list[Tensor]:
        with_bias = torch.ops.aten.addmm.default(b, x, w.t())
        return [with_bias, *_layer(x, other)]

    x, w, other, _ = _given()
    given = (x, w, other, torch.randn(len(w)))
    gm = _graph(body, *given)
    want = gm(*given)
    assert run_passes(gm, MULTIPLIES, check_each=True).matches["merge_products"] == 2
    biased, plain = _merged(gm)
    assert len(biased.args[2]) == 1 and plain.args[2] == []
    gm.recompile()
    for got, wanted in zip(gm(*given), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_two_views_of_one_value_are_one_input(monkeypatch: Any) -> None:
    use_session(monkeypatch)

    def body(r: Tensor, w: Tensor, other: Tensor) -> list[Tensor]:
        first = torch.ops.aten.mm.default(r.view(3, HIDDEN), w.t())
        return [first, *_layer(r.view(3, HIDDEN), other)]

    x, w, other, _ = _given()
    gm = _graph(body, x.view(1, 3, HIDDEN), w, other)
    run_passes(gm, MULTIPLIES, check_each=True)
    (merged,) = _merged(gm)
    assert len(merged.args[1]) == 2


def _transposed_weight(x: Tensor, w: Tensor) -> list[Tensor]:
    return [torch.ops.aten.mm.default(x, w), *_layer(x)]


def _computed_weight(x: Tensor, w: Tensor) -> list[Tensor]:
    return [torch.ops.aten.mm.default(x, (w * 2).t()), *_layer(x)]


def _scaled_bias(x: Tensor, w: Tensor) -> list[Tensor]:
    return [torch.ops.aten.addmm.default(w[:, 0], x, w.t(), beta=2), *_layer(x)]


def test_the_option_turns_it_off(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    gm = _graph(_layer, *_given())
    config = PassConfig(multiplies=True, products=False, prefetch=False)
    assert run_passes(gm, config).matches["merge_products"] == 0 and not _merged(gm)


def _on_gpu(monkeypatch: Any, body: Any, *given: Tensor) -> GraphModule:
    """A graph that says of its values that they are on a GPU, and runs on the CPU."""
    use_session(monkeypatch)
    gm = _graph(body, *given, mode="fake")
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            with value.fake_mode:
                node.meta["val"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cuda"
                )
    return gm


def test_on_a_gpu_four_weights_of_one_token_are_one_launch(monkeypatch: Any) -> None:
    weights = [torch.randn(n, HIDDEN) for n in (5, 7, 4, 3, 6)]
    given = (torch.randn(1, HIDDEN), *weights)
    gm = _on_gpu(monkeypatch, _layer, *given)
    want = gm(*given)
    assert run_passes(gm, MULTIPLIES).matches["merge_products"] == 5
    merged = [node for node in gm.graph.nodes if node.target is ON_GPU]
    assert [len(node.args[1]) for node in merged] == [4, 1] and not _merged(gm)
    gm.recompile()
    for got, wanted in zip(gm(*given), want, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("tokens", "outputs"), [(2, 5), (1, MAX_OUTPUTS + 1)], ids=["two tokens", "a head"]
)
def test_what_a_gpu_does_not_gain_by_is_left(tokens: int, outputs: int, monkeypatch: Any) -> None:
    gm = _on_gpu(monkeypatch, _layer, torch.ones(tokens, HIDDEN), torch.ones(outputs, HIDDEN))
    assert run_passes(gm, MULTIPLIES).matches["merge_products"] == 0


@pytest.mark.parametrize(
    ("body", "given"),
    [
        (_transposed_weight, (torch.ones(3, HIDDEN), torch.ones(HIDDEN, 5))),
        (_computed_weight, (torch.ones(3, HIDDEN), torch.ones(5, HIDDEN))),
        (_scaled_bias, (torch.ones(3, HIDDEN), torch.ones(5, HIDDEN))),
        (_layer, (torch.ones(17, HIDDEN), torch.ones(5, HIDDEN))),
        (_layer, (torch.ones(3, HIDDEN).double(), torch.ones(5, HIDDEN).double())),
        (_layer, (torch.ones(3, HIDDEN), torch.ones(HIDDEN, 5).t())),
    ],
    ids=["not transposed", "computed", "scaled", "prefill", "float64", "strided"],
)
def test_what_the_engine_does_not_take_is_left(body: Any, given: tuple[Tensor, ...]) -> None:
    gm = _graph(body, *given)
    assert run_passes(gm, MULTIPLIES).matches["merge_products"] == 0
    assert not _merged(gm)


def test_an_open_number_of_tokens_is_left() -> None:
    gm = _graph(_layer, *_given()[:2], mode="symbolic")
    assert run_passes(gm, MULTIPLIES).matches["merge_products"] == 0


def test_without_an_engine_that_multiplies_nothing_changes() -> None:
    gm = _graph(_layer, *_given())
    before = str(gm.graph)
    run_passes(gm, PassConfig(prefetch=False))
    assert str(gm.graph) == before


def test_routers_and_their_clones_multiply_alike(monkeypatch: Any) -> None:
    found = []
    for multiplies in (False, True):
        session = use_session(monkeypatch)
        gm = trace(plain_block)
        report = run_passes(gm, PassConfig(multiplies=multiplies), check_each=True)
        # Three routers and the clones of two.
        assert report.matches["merge_products"] == (5 if multiplies else 0)
        gm.recompile()
        found.append((gm(*inputs()), session.predicted))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
