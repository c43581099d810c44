"""A prefill passes by the slots of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cache.eviction import PROMPT_TOKENS
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.stream_model import StreamModel


@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_slots_hold_after_a_prefill_what_they_held_before(transfer: Any) -> None:
    plain, streams = tiny_qwen3_moe(layers=2), StreamModel()
    model, session = on_device(plain, streams, slots=4)
    modules = [layer.mlp.experts for layer in model.model.layers]
    token, prompt = torch.randn(1, 64), torch.randn(24, 64)
    everyone = torch.arange(48).remainder(8).view(24, 2)
    with session:
        session.configure(SessionOptions(transfer=transfer))
        for module in modules:
            module(token, torch.tensor([[5, 2]]), torch.full((1, 2), 0.5))
        streams.finish()
        before = [bank.clone() for bank in session.engine.cache.banks]
        counted = session.stats.total
        assert counted.misses == 4
        for layer, module in enumerate(modules):
            out = module(prompt, everyone, torch.full((24, 2), 0.5))
            experts = plain.model.layers[layer].mlp.experts
            expected = experts(prompt, everyone, torch.full((24, 2), 0.5)).detach()
            torch.testing.assert_close(out, expected)
        streams.finish()
        assert all(map(torch.equal, session.engine.cache.banks, before))
        for module in modules:
            module(token, torch.tensor([[5, 2]]), torch.full((1, 2), 0.5))
        total = session.stats.total
    assert (total.hits, total.misses) == (counted.hits + 4, counted.misses)


def prefill(experts: Any, prompt: torch.Tensor) -> None:
    experts(torch.randn(len(prompt), 64), prompt, torch.full(prompt.shape, 0.5))


def counts(session: Any, layer: int, transfer: str) -> tuple[list[list[int]], int]:
    """Scores and clock of the tables that decoding uses."""
    if transfer == "gather":
        tables = session.engine.cache.tables[layer]
        return tables.scores.tolist(), int(tables.clock)
    table = session.engine._decoder._table
    return table.scores[layer].table.tolist(), table.clock[layer]


@pytest.mark.parametrize("transfer", ["gather", "copy"])
@pytest.mark.parametrize("late", [True, False])
def test_a_prefill_is_counted_without_waiting_for_it(transfer: Any, late: bool) -> None:
    """Tables are those of the Python policy; one of the prompts is longer than is counted."""
    plain, streams = tiny_qwen3_moe(layers=2), StreamModel(late=late, patience=10)
    model, session = on_device(plain, streams, slots=4)
    experts = model.model.layers[1].mlp.experts
    expected = ExpertCache(num_experts=[8], slots=[4], policy="adaptive")
    with session:
        session.configure(SessionOptions(transfer=transfer))
        before = streams.waits.count(("host", "compute"))
        for tokens in (24, PROMPT_TOKENS + 30, 17):
            prompt = torch.randint(0, 8, (tokens, 2))
            prefill(experts, prompt)
            expected.note_prompt(0, prompt.numpy())
        if late:
            assert streams.waits.count(("host", "compute")) == before
        assert session.stats.total.steps == 0
        for token in ([5, 2], [5, 3]):
            experts(torch.randn(1, 64), torch.tensor([token]), torch.full((1, 2), 0.5))
            expected.plan(0, token)
        streams.finish()
        scores, clock = counts(session, 1, transfer)
    assert clock == expected.clock[0] == 24 + PROMPT_TOKENS + 17 + 2
    assert scores == expected.scores[0].table.tolist()


@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_forgotten_slots_forget_prompts_too(transfer: Any) -> None:
    plain, streams = tiny_qwen3_moe(layers=2), StreamModel()
    model, session = on_device(plain, streams, slots=4)
    experts = model.model.layers[0].mlp.experts
    with session:
        session.configure(SessionOptions(transfer=transfer))
        prefill(experts, torch.randint(0, 8, (24, 2)))
        session.engine.forget_slots()
        experts(torch.randn(1, 64), torch.tensor([[5, 2]]), torch.full((1, 2), 0.5))
        streams.finish()
        scores, _ = counts(session, 0, transfer)
    assert [[expert for expert in range(8) if row[expert]] for row in scores] == [[2, 5]] * 4


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_other_policies_count_no_prompt(policy: Any, transfer: Any) -> None:
    plain, streams = tiny_qwen3_moe(layers=2), StreamModel()
    model, session = on_device(plain, streams, slots=4, cache_policy=policy)
    experts = model.model.layers[0].mlp.experts
    with session:
        session.configure(SessionOptions(transfer=transfer))
        prefill(experts, torch.randint(0, 8, (24, 2)))
        experts(torch.randn(1, 64), torch.tensor([[5, 2]]), torch.full((1, 2), 0.5))
        streams.finish()
        _, clock = counts(session, 0, transfer)
    assert clock == 1
