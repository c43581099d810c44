"""Attention over a static cache: where it is rewritten, with what, where not, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache

from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.passes.read_filled_cache import AttentionReport, read_filled_cache
from tests.passes.families import EXPERTS, HIDDEN, VOCABULARY, tiny
from tests.passes.graphs import use_session

OPS = torch.ops.specmoe_kernels
LENGTH = 24
# Model type, changes of its configuration, masks that its layers share.
CASES = [
    ("qwen3_moe", {}, 1),
    ("mixtral", {"sliding_window": 8}, 1),
    ("gpt_oss", {"sliding_window": 8}, 2),
]


def captured(
    function: Callable[..., Any], *args: Any, device_types: tuple[str, ...] = ("cpu",)
) -> tuple[GraphModule, AttentionReport, Any]:
    """Trace a call, rewrite it, run it: the graph, the report and what it gave."""
    kept: list[Any] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        kept.extend((gm, read_filled_cache(gm, device_types=device_types)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    return kept[0], kept[1], result


def calls(gm: GraphModule, op: Any) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is op]


def decode(model: Any, run: Callable[..., Any], batch: int = 2, steps: int = 3) -> list[Tensor]:
    """Logits of `steps` decode steps that `run` does, each as `generate` would call it."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCABULARY, (batch, 5 + steps), generator=generator)
    padding = torch.ones(batch, 5 + steps, dtype=torch.long)
    padding[0, :2] = 0
    kept = cache_argument(model, StaticCache(config=model.config, max_cache_len=LENGTH))
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    logits = []
    for end in range(5, 5 + steps):
        inputs = model.prepare_inputs_for_generation(
            tokens[:, :end],
            next_sequence_length=5 if end == 5 else 1,
            attention_mask=padding[:, :end],
            position_ids=positions[:, :end],
            **kept,
        )
        logits.append((model if end == 5 else run)(**inputs).logits)
    return logits[1:]


@pytest.mark.parametrize(("family", "changes", "masks"), CASES, ids=[c[0] for c in CASES])
@torch.no_grad()
def test_every_layer_of_a_decode_step_is_rewritten(
    monkeypatch: Any, family: str, changes: dict[str, Any], masks: int
) -> None:
    use_session(monkeypatch, hidden=HIDDEN, experts=EXPERTS)
    model, layers = tiny(family, **changes)
    want = decode(model, model)
    found: list[tuple[GraphModule, AttentionReport]] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        found.append((gm, read_filled_cache(gm, device_types=("cpu",))))
        return gm.forward

    got = decode(model, torch.compile(model, backend=backend, fullgraph=True))
    # Softmax over fewer keys sums in another order.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for gm, report in found:
        assert report.matches == layers and not report.skipped
        assert len(calls(gm, OPS.attended_range.default)) == masks
        assert not calls(gm, scaled_dot_product_attention)
        again = read_filled_cache(gm, device_types=("cpu",))
        assert again.matches == 0 and not again.skipped
        for node in calls(gm, OPS.decode_attention.default):
            q, k, v, mask, bounds, sinks, scale = node.args
            heads = [n.meta["example_value"].shape[1] for n in (q, k, v)]
            assert heads == [4, 2, 2], "keys and values are not repeated"
            assert bounds.target is OPS.attended_range.default and bounds.args == (mask,)
            assert (sinks is not None) == (family == "gpt_oss") and scale == 0.25


@torch.no_grad()
def test_what_is_not_filled_is_not_read(monkeypatch: Any) -> None:
    q, k, v, mask = operands()
    k[:, :, 10:] = float("nan")
    v[:, :, 10:] = float("nan")
    _, report, got = captured(plain, q, k, v, mask)
    assert report.matches == 1 and not got.isnan().any()


def operands(queries: int = 1, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [2, 4, Q, 16], k and v [2, 2, 24, 16], and a mask that lets 10 keys through."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, queries, 16, **kwargs)
    k, v = (torch.randn(2, 2, LENGTH, 16, **kwargs) for _ in range(2))
    mask = (torch.arange(LENGTH) < 10).expand(2, 1, queries, LENGTH).contiguous()
    return q, k, v, mask


def repeated(x: Tensor) -> Tensor:
    batch, heads, length, head = x.shape
    return x[:, :, None, :, :].expand(batch, heads, 2, length, head).reshape(batch, 4, length, head)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
    return scaled_dot_product_attention(
        q, repeated(k), repeated(v), attn_mask=mask, dropout_p=0.0, is_causal=False, **kwargs
    )


def test_arguments_by_place_and_the_default_scale() -> None:
    def by_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, repeated(k), repeated(v), mask)

    gm, report, got = captured(by_place, *operands())
    (node,) = calls(gm, OPS.decode_attention.default)
    assert report.matches == 1 and node.args[6] == 0.25
    torch.testing.assert_close(got, plain(*operands()))


def test_heads_of_their_own_are_rewritten_too() -> None:
    def single(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)

    q, k, v, mask = operands()
    _, report, got = captured(single, q, repeated(k), repeated(v), mask)
    assert report.matches == 1
    torch.testing.assert_close(got, plain(q, k, v, mask, scale=0.5))


def _no_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, repeated(k), repeated(v))


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)


def _dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, repeated(k), repeated(v), mask, dropout_p=0.5)


def _narrow_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, repeated(k), repeated(v)[..., :8], mask)


def _changed_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    keys, values = repeated(k), repeated(v)
    k.zero_()
    return scaled_dot_product_attention(q, keys, values, mask)


@pytest.mark.parametrize(
    ("function", "queries", "reason"),
    [
        (_no_mask, 1, "no mask"),
        (_causal, 2, "causal"),
        (_dropout, 1, "dropout"),
        (_narrow_values, 1, "head sizes"),
        (_changed_between, 1, "change before"),
        (plain, 17, "prefill"),
    ],
)
def test_left_alone(function: Any, queries: int, reason: str) -> None:
    gm, report, _ = captured(function, *operands(queries))
    assert report.matches == 0 and len(report.skipped) == 1 and reason in report.skipped[0]
    assert calls(gm, scaled_dot_product_attention)


def test_left_alone_on_other_devices() -> None:
    _, report, _ = captured(plain, *operands(), device_types=("cuda",))
    assert report.matches == 0 and "left to PyTorch" in report.skipped[0]


@pytest.mark.parametrize(("open_size", "matches"), [("length", 1), ("batch", 0)])
def test_the_length_of_a_cache_may_be_open(open_size: str, matches: int) -> None:
    q, k, v, mask = operands()
    sizes = {"length": ((k, 2), (v, 2), (mask, 3)), "batch": ((q, 0), (k, 0), (v, 0), (mask, 0))}
    for tensor, dimension in sizes[open_size]:
        torch._dynamo.mark_dynamic(tensor, dimension)
    found = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        found.append(read_filled_cache(gm, device_types=("cpu",)))
        return gm.forward

    with torch.no_grad():
        got = torch.compile(plain, backend=backend)(q, k, v, mask)
    assert found[0].matches == matches and len(found[0].skipped) == 1 - matches
    torch.testing.assert_close(got, plain(q, k, v, mask))


def test_too_many_heads_for_one_head_of_keys_are_left_alone() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        keys, values = (
            x[:, :, None, :, :].expand(1, 1, 64, 8, 16).reshape(1, 64, 8, 16) for x in (k, v)
        )
        return scaled_dot_product_attention(q, keys, values, mask)

    q, k = torch.randn(1, 64, 1, 16), torch.randn(1, 1, 8, 16)
    _, report, _ = captured(shared, q, k, k.clone(), torch.ones(1, 1, 1, 8, dtype=torch.bool))
    assert report.matches == 0 and "share" in report.skipped[0]
