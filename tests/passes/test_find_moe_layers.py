"""The analysis that all passes stand on: which node is the residual, the router, the sum."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.graphs import (
    EXPERTS,
    HIDDEN,
    OPS,
    TOKENS,
    TOP_K,
    attention,
    calls,
    hashed_block,
    layers_of,
    norm,
    plain_block,
    route,
    trace,
)


def _shared(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) @ torch.ones(HIDDEN, HIDDEN, dtype=x.dtype)


def _shared_after(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    y = OPS.experts(x, ids, weights, 0, layer)
    return r + (y + _shared(x))


def _shared_first(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    shared = _shared(x)
    ids, weights = route(x, gate)
    return (shared + OPS.experts(x, ids, weights, 0, layer)) + r


def _gated_shared(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    y = OPS.experts(x, ids, weights, 0, layer)
    return r + (y + torch.sigmoid(x[:, :1]) * _shared(x))


def _scaled(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    return r + OPS.experts(x, ids, weights, 0, layer) * 0.22


def _scaled_residual(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    y = OPS.experts(x, ids, weights, 0, layer)
    shift = torch.linspace(-1, 1, HIDDEN, dtype=r.dtype)
    return (y + shift) * 0.5 + (r + shift) * (1 + shift)


def _normed_after(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    return r + norm(OPS.experts(x, ids, weights, 0, layer))


def _batched(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    flat = x.reshape(-1, x.shape[-1])
    ids, weights = route(flat, gate)
    return r + OPS.experts(flat, ids, weights, 0, layer).view(x.shape)


def _batched_shared_after(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    flat = x.reshape(-1, HIDDEN)
    ids, weights = route(flat, gate)
    y = OPS.experts(flat, ids, weights, 0, layer).view(x.shape)
    return r + (y + _shared(flat).view(x.shape))


def _parallel(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    return (r + _shared(x)) + OPS.experts(x, ids, weights, 0, layer)


def _parallel_experts_first(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    ids, weights = route(x, gate)
    return (r + OPS.experts(x, ids, weights, 0, layer)) + _shared(x)


def _sigmoid_groups(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    x = norm(r)
    scores = torch.sigmoid((x @ gate.t()).float())
    groups = torch.topk(scores.view(-1, 4, EXPERTS // 4).sum(-1), 2).indices
    mask = torch.zeros(x.shape[0], 4).scatter(1, groups, 1.0)
    masked = scores.masked_fill(mask.repeat_interleave(EXPERTS // 4, dim=1) == 0, 0.0)
    ids = torch.topk(masked, TOP_K, sorted=False).indices
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * 2.5
    return r + (OPS.experts(x, ids, weights, 0, layer) + _shared(x))


def _own_router_norm(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    ids, weights = route(norm(r * 0.5), gate)
    return r + OPS.experts(norm(r), ids, weights, 0, layer)


@pytest.mark.parametrize(
    "block",
    [
        plain_block,
        _shared_after,
        _shared_first,
        _gated_shared,
        _scaled,
        _scaled_residual,
        _normed_after,
        _parallel,
        _parallel_experts_first,
        _sigmoid_groups,
        _own_router_norm,
    ],
)
def test_residual_router_and_sum_are_found(block: Callable[..., Tensor]) -> None:
    gm = trace(block)
    layers = layers_of(gm)
    assert [layer.index for layer in layers] == [0, 1, 2]
    for layer, previous in zip(layers[1:], layers[:-1], strict=True):
        assert layer.reason is None
        # attention() ends in r + ..., so the residual is a sum that starts from the layer before.
        assert layer.residual is not None and layer.residual.args[0] is previous.output
        assert layer.output is not None and layer.output in layer.update
        assert layer.residual not in layer.router
        assert {layer.ids, layer.weights} <= set(layer.router)
    (output,) = gm.graph.find_nodes(op="output")
    assert output.all_input_nodes == [layers[-1].output]


def test_shared_experts_are_not_taken_for_the_residual() -> None:
    layer = layers_of(trace(_shared_after))[0]
    assert layer.residual is not None
    (total,) = [n for n in layer.update if n is layer.output]
    assert layer.residual in total.all_input_nodes


def test_batched_states_and_views() -> None:
    gm = trace(_batched, r=torch.randn(2, TOKENS, HIDDEN))
    for layer in layers_of(gm):
        assert layer.reason is None
        assert layer.residual is not None and layer.output is not None
        assert layer.residual.meta["val"].shape == (2, TOKENS, HIDDEN)
        assert layer.output.meta["val"].shape == (2, TOKENS, HIDDEN)
        assert layer.x.meta["val"].shape == (2 * TOKENS, HIDDEN)


def test_the_open_size_of_a_batch_is_not_taken_for_the_residual() -> None:
    gm = trace(_batched_shared_after, r=torch.randn(2, 7, HIDDEN), tracing_mode="symbolic")
    for layer in layers_of(gm):
        assert layer.reason is None
        assert layer.residual is not None
        assert isinstance(layer.residual.meta["val"], Tensor)
        assert layer.residual.meta["val"].dim() == 3


STREAMS = 2


def _mixed_streams(r: Tensor, gate: Tensor, layer: int) -> Tensor:
    """Hyper-connections: r, [1, T, N streams, H], is mixed where others add it as it is."""
    mix = torch.softmax(r @ r.transpose(-1, -2), dim=-1)
    x = norm(r.mean(dim=2)).reshape(-1, HIDDEN)
    ids, weights = route(x, gate)
    y = OPS.experts(x, ids, weights, 0, layer).view(1, -1, 1, HIDDEN)
    return torch.sigmoid(r.mean(-1)).unsqueeze(-1) * y + torch.matmul(mix.transpose(-1, -2), r)


def test_streams_that_are_mixed_are_the_residual() -> None:
    gm = trace(_mixed_streams, r=torch.randn(1, TOKENS, STREAMS, HIDDEN))
    layers = layers_of(gm)
    for layer, previous in zip(layers[1:], layers[:-1], strict=True):
        assert layer.reason is None
        assert layer.residual is not None and layer.residual.args[0] is previous.output
        assert layer.residual.meta["val"].shape == (1, TOKENS, STREAMS, HIDDEN)


def test_attention_beside_the_experts_is_not_taken_for_mixed_streams() -> None:
    def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        flat = x.reshape(-1, HIDDEN)
        ids, weights = route(flat, gate)
        y = OPS.experts(flat, ids, weights, 0, layer).view(x.shape)
        return r + (y + torch.softmax(x @ x.transpose(-1, -2), dim=-1) @ x)

    layers = layers_of(trace(block, r=torch.randn(2, TOKENS, HIDDEN)))
    for layer, previous in zip(layers[1:], layers[:-1], strict=True):
        assert layer.residual is not None and layer.residual.args[0] is previous.output


def _attention_router(r: Tensor, gate: Tensor, layer: int, dropout: float) -> Tensor:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    states = r.view(1, 1, -1, HIDDEN)
    x = attend(states, states, states, dropout)[0].view(-1, HIDDEN)
    ids, weights = route(x, gate)
    return r + OPS.experts(norm(r), ids, weights, 0, layer)


def test_attention_may_stand_in_front_of_the_router_if_it_drops_nothing() -> None:
    for layer in layers_of(trace(functools.partial(_attention_router, dropout=0.0))):
        assert layer.reason is None
        assert any("attention" in node.name for node in layer.router)
    for layer in layers_of(trace(functools.partial(_attention_router, dropout=0.5))):
        assert "its router's choice passes through _scaled_dot" in (layer.reason or "")


def test_low_precision_states_with_casts() -> None:
    gm = trace(plain_block, r=torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16))
    for layer in layers_of(gm):
        assert layer.reason is None
        assert layer.residual is not None
        assert layer.residual.meta["val"].dtype == torch.bfloat16


def test_no_residual_stream_gives_a_reason() -> None:
    def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        ids, weights = route(x, gate)
        return OPS.experts(x, ids, weights, 0, layer)

    layers = layers_of(trace(block))
    assert all("no residual stream" in (layer.reason or "") for layer in layers)
    assert all(layer.residual is None and not layer.router for layer in layers)


def test_hashed_routing_weighs_by_the_stream() -> None:
    for layer in layers_of(trace(hashed_block)):
        assert layer.reason is None
        assert layer.weights in layer.router and layer.ids not in layer.router


def test_router_that_does_not_read_the_state_gives_a_reason() -> None:
    def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        ids, weights = route(gate[:TOKENS], gate)
        return r + OPS.experts(norm(r), ids, weights, 0, layer)

    layers = layers_of(trace(block))
    assert all("no residual stream" in (layer.reason or "") for layer in layers)


def test_layer_that_runs_twice_gives_a_reason() -> None:
    def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        return plain_block(attention(plain_block(r, gate, 7)), gate, layer)

    layers = layers_of(trace(block, layers=2))
    assert [layer.index for layer in layers] == [7, 0, 7, 1]
    assert [layer.reason for layer in layers] == [
        "it runs 2 times in this graph",
        None,
        "it runs 2 times in this graph",
        None,
    ]


def test_random_router_gives_a_reason() -> None:
    def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        noisy = torch.ops.aten.bernoulli.default(torch.sigmoid(x))
        ids, weights = route(noisy, gate)
        return r + OPS.experts(x, ids, weights, 0, layer)

    layers = layers_of(trace(block))
    assert all("its router's choice passes through bernoulli" in (n.reason or "") for n in layers)


def test_random_sum_gives_a_reason() -> None:
    def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        ids, weights = route(x, gate)
        y = OPS.experts(x, ids, weights, 0, layer)
        return r + y * torch.ops.aten.bernoulli.default(torch.sigmoid(y))

    layers = layers_of(trace(block))
    assert all("passes through bernoulli" in (layer.reason or "") for layer in layers)


def test_graph_is_not_changed() -> None:
    gm = trace(plain_block)
    before = str(gm.graph)
    layers_of(gm)
    assert str(gm.graph) == before
    assert len(calls(gm.graph, "experts")) == 3
