"""Slots that were emptied hold nothing, whatever was on its way into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda.tables import DeviceCache
from specmoe_compile.runtime.experts.layout import ExpertLayout
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel


@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_emptied_slots_are_filled_anew(transfer: Any) -> None:
    plain, streams = tiny_qwen3_moe(layers=2), StreamModel()
    x, ids, weights = torch.randn(1, 64), torch.tensor([[1, 6]]), torch.full((1, 2), 0.5)
    with torch.no_grad():
        expected = plain.model.layers[1].mlp.experts(x, ids, weights)
    model, session = on_device(plain, streams, slots=4)
    module = model.model.layers[1].mlp.experts
    with session:
        session.configure(SessionOptions(transfer=transfer))
        for _ in range(2):
            module(x, ids, weights)
        session.start_prefetch(1, torch.tensor([[2, 3]]), weights)
        session.engine.forget_slots()
        streams.finish()
        for bank in session.engine.cache.banks:
            bank.fill_(255)  # NaN
        torch.testing.assert_close(module(x, ids, weights), expected)
        total = session.stats.total
    assert (total.steps, total.hits, total.misses) == (3, 2, 4)
    assert not unordered_pairs(streams.ops)


class CountOps(TorchDispatchMode):
    """Counts ops, each a launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_emptying_takes_as_many_launches_for_any_number_of_layers() -> None:
    layout = ExpertLayout.from_shapes({"up_proj": ((4, 4), torch.float32)})
    counts = []
    for layers in (1, 9):
        cache = DeviceCache([layout] * layers, [8] * layers, [4] * layers, torch.device("cpu"))
        cache.tables[-1].slot_of[3] = 2
        with CountOps() as counter:
            cache.forget()
        assert (cache.tables[-1].slot_of == -1).all()
        counts.append(counter.count)
    assert counts[0] == counts[1] <= 6


def test_a_session_that_ends_within_a_trace_is_closed_and_keeps_its_counts() -> None:
    """A session that nobody refers to is closed by the garbage collector, whenever that runs."""
    plain, streams = tiny_qwen3_moe(layers=1), StreamModel()
    model, session = on_device(plain, streams, slots=4)
    x, ids, weights = torch.randn(1, 64), torch.tensor([[1, 6]]), torch.full((1, 2), 0.5)
    model.model.layers[0].mlp.experts(x, ids, weights)
    streams.finish()
    with FakeTensorMode():
        session.close()
    assert session.closed and session.stats.total.misses == 2
