"""A `DeviceSession` gives the tokens of the unmodified model under late, poisoned streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import greedy, prompts, tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="specmoe", options={"lowering": "eager", **options})


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_qwen3_moe()


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("slots", [2, 3, 8])
def test_tokens_are_those_of_the_plain_model(plain: Any, slots: int, policy: str) -> None:
    streams = StreamModel()
    model, session = on_device(plain, streams, slots=slots, cache_policy=policy)
    ids = prompts(1, 5)
    with session:
        assert torch.equal(greedy(compiled(model), ids, 12), greedy(plain, ids, 12))
        total = session.stats.total
        assert total.misses > 0
        assert total.prefetches > 0
        assert not unordered_pairs(streams.ops)
