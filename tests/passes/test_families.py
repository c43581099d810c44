"""The passes on real models: every MoE layer but the first is predicted, and the values stay.

Order is tested as the order of execution, after Inductor has scheduled the graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.passes.manager import SpeculationPass
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.families import EXPERTS, FAMILIES, HIDDEN, VOCABULARY, tiny
from tests.passes.graphs import RecordingSession, use_session
from tests.passes.lowering import compile_with, interpret_with

# DeepSeek-V3 goes through Inductor below, with a lookahead of two.
_ALWAYS_COMPILED = ("qwen3_moe",)
# What Dynamo and the passes decide shows in the graph; the slow tests generate code for it, too.
_LOWERINGS = [
    pytest.param(interpret_with, id="graph"),
    pytest.param(compile_with, id="inductor", marks=pytest.mark.slow),
]


def _tokens(batch: int = 2, length: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def _session(monkeypatch: Any) -> RecordingSession:
    return use_session(monkeypatch, hidden=HIDDEN, experts=EXPERTS)


def _check_order(session: RecordingSession, layers: int) -> None:
    for layer in range(1, layers):
        demand, start = session.at("wait", layer - 1), session.at("start", layer)
        assert demand < start < session.at("run", layer - 1), session.events
        assert start < session.at("wait", layer) < session.at("run", layer), session.events


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rewritten_graph_computes_the_same(monkeypatch: Any, family: str) -> None:
    session = _session(monkeypatch)
    model, layers = tiny(family)
    want = model(_tokens(), use_cache=False).logits
    session.events.clear()
    speculation = SpeculationPass(PassConfig())
    got = interpret_with(model, speculation)(_tokens(), use_cache=False).logits
    (report,) = speculation.reports
    assert report.matches["insert_expert_prefetch"] == layers - 1
    assert list(report.skipped) == [0]
    # The same aten ops on the same values, apart from decompositions of softmax and norms.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    _check_order(session, layers)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in _ALWAYS_COMPILED else pytest.mark.slow)
        for family in FAMILIES
    ],
)
@torch.no_grad()
def test_inductor_keeps_values_and_order(monkeypatch: Any, family: str) -> None:
    session = _session(monkeypatch)
    model, layers = tiny(family)
    want = model(_tokens(), use_cache=False).logits
    session.events.clear()
    speculation = SpeculationPass(PassConfig())
    with torch._inductor.config.patch(fx_graph_cache=False):
        got = compile_with(model, speculation)(_tokens(), use_cache=False).logits
    assert len(speculation.reports) == 1
    # Inductor reorders float32 sums in norms and softmax.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    _check_order(session, layers)
    assert not any(name == "experts" for name, _ in session.events)


@pytest.mark.parametrize("lower", _LOWERINGS)
@torch.no_grad()
def test_control_recalls_everything(monkeypatch: Any, lower: Any) -> None:
    session = _session(monkeypatch)
    model, layers = tiny("qwen3_moe")
    speculation = SpeculationPass(PassConfig(control=True))
    with torch._inductor.config.patch(fx_graph_cache=False):
        lower(model, speculation)(_tokens(), use_cache=False)
    assert session.recall == {layer: [1.0] for layer in range(1, layers)}


@torch.no_grad()
def test_lookahead_of_two_and_wider_predictions_through_inductor(monkeypatch: Any) -> None:
    session = _session(monkeypatch)
    model, layers = tiny("deepseek_v3", num_hidden_layers=4)
    want = model(_tokens(), use_cache=False).logits
    session.events.clear()
    speculation = SpeculationPass(PassConfig(lookahead=2, prefetch_width=5))
    with torch._inductor.config.patch(fx_graph_cache=False):
        got = compile_with(model, speculation)(_tokens(), use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert session.at("start", 1) < session.at("start", 2) < session.at("run", 0)
    assert all(ids.shape == (10, 5) for ids in session.predicted.values())
    assert len(session.predicted) == layers - 1


@pytest.mark.parametrize("lower", _LOWERINGS)
@torch.no_grad()
def test_decode_with_a_static_cache_is_rewritten_once(monkeypatch: Any, lower: Any) -> None:
    session = _session(monkeypatch)
    model, layers = tiny("qwen3_moe")
    tokens = _tokens(batch=1)

    def decode(run: Any) -> list[torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=16)
        kept = cache_argument(model, cache)
        model(tokens, **kept, cache_position=torch.arange(5))
        logits = []
        for position in range(5, 8):
            step = torch.tensor([[position]])
            where = torch.tensor([position])
            out = run(step, **kept, cache_position=where, position_ids=where[None])
            logits.append(out.logits)
        return logits

    want = decode(model)
    speculation = SpeculationPass(PassConfig())
    with torch._inductor.config.patch(fx_graph_cache=False):
        got = decode(lower(model, speculation))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(speculation.reports) == 1, "steady decode must not compile again"
    assert sum(event == ("start", layers - 1) for event in session.events) == 3


@torch.no_grad()
def test_low_precision_and_dynamic_batch(monkeypatch: Any) -> None:
    _session(monkeypatch)
    model, layers = tiny("qwen3_moe")
    model = model.to(torch.bfloat16)
    speculation = SpeculationPass(PassConfig())
    run = interpret_with(model, speculation)
    tokens = _tokens(batch=3)
    torch._dynamo.mark_dynamic(tokens, 0)
    got = run(tokens, use_cache=False).logits
    want = model(tokens, use_cache=False).logits
    assert speculation.reports[0].matches["insert_expert_prefetch"] == layers - 1
    # bfloat16 has 8 bits; decompositions round in other places.
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    run(_tokens(batch=4), use_cache=False)
    assert len(speculation.reports) == 1
