"""A prefill passes by the slots of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specmoe_compile.options import SessionOptions
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
