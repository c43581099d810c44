"""A prefetch on a device keeps to its byte budget, and lets what is demanded go first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specmoe_compile.options import SessionOptions
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.stream_model import StreamModel


@pytest.mark.parametrize(("records", "fetched"), [(0, []), (1, [5]), (2, [5, 6]), (9, [5, 6, 7])])
def test_the_surest_missing_experts_are_fetched_within_the_budget(
    records: int, fetched: list[int]
) -> None:
    streams = StreamModel()
    _, session = on_device(tiny_qwen3_moe(layers=2), streams, slots=7)
    with session:
        budget = records * session.store.layouts[1].record_bytes
        session.configure(SessionOptions(transfer="gather", prefetch_budget_bytes=budget))
        decoder: Any = session.engine._decoder
        decoder.demand(1, torch.tensor([[3, 4]]))
        streams.finish()
        # Two tokens: the first choices of both come first, and what is there costs nothing.
        ids, weights = torch.tensor([[3, 6], [5, 7]]), torch.full((2, 2), 0.5)
        session.start_prefetch(1, ids, weights)
        streams.finish()
        layer = session.stats.layers[1]
        decoder.demand(1, torch.tensor([[5, 6, 7]]))
        after = session.stats.layers[1]
    assert layer.prefetches == len(fetched)
    assert layer.speculative_bytes == len(fetched) * session.store.layouts[1].record_bytes
    assert after.misses - layer.misses == 3 - len(fetched)


@pytest.mark.parametrize(("transfer", "fetched"), [("gather", 1), ("copy", 2)])
def test_without_a_budget_only_what_can_be_cancelled_is_fetched_in_number(
    transfer: Any, fetched: int
) -> None:
    streams = StreamModel()
    _, session = on_device(tiny_qwen3_moe(layers=2), streams, slots=7)
    with session:
        session.configure(SessionOptions(transfer=transfer, auto_off=False))
        session.start_prefetch(1, torch.tensor([[5, 6]]), torch.full((1, 2), 0.5))
        streams.finish()
        decoder: Any = session.engine._decoder
        decoder.demand(1, torch.tensor([[1]]))
        streams.finish()
        assert session.stats.layers[1].prefetches == fetched


def test_predicted_records_wait_for_demanded_ones() -> None:
    streams = StreamModel()
    _, session = on_device(tiny_qwen3_moe(layers=2), streams, slots=7)
    with session:
        session.configure(SessionOptions(transfer="gather"))
        decoder: Any = session.engine._decoder
        decoder.demand(0, torch.tensor([[1, 2]]))
        decoder.prefetch(1, torch.tensor([[3, 4]]))
        assert ("prefetch", "demand") in streams.waits
        streams.finish()
