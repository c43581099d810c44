"""A real GPU gives the plain model's tokens by either transfer, from memory that it returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import specmoe_compile
from specmoe_compile.generation import session_of
from tests.helpers import greedy, prompts, tiny_qwen3_moe

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "gather": {"transfer": "gather"},
    "copy": {"transfer": "copy"},
    "auto": {},
    "copy, two ahead": {"transfer": "copy", "lookahead": 2},
    "gather, graph": {"mode": "reduce-overhead"},
}


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_qwen3_moe().cuda()


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_the_plain_model(
    name: str, batch: int, length: int, plain: Any
) -> None:
    ids = prompts(batch, length).cuda()
    static = {"cache_implementation": "static"} if "graph" in name else {}
    expected = greedy(plain, ids, 16, **static)
    model = specmoe_compile.offload(
        copy.deepcopy(plain), device="cuda", store="ram", expert_cache="50%", progress=False
    )
    session: Any = session_of(model)
    for bank in session.cache.banks:
        bank.fill_(255)  # NaN in every float type: a slot that is read before it is filled shows
    compiled = torch.compile(model, backend="specmoe", options=OPTIONS[name])
    for _ in range(2):
        assert torch.equal(greedy(compiled, ids, 16, **static), expected)
    if name == "auto":
        rates = session.transfer_rates
        assert min(rates.copy_gbps, rates.gather_gbps) > 0
        assert session.transfer == rates.faster
    region = session.store.region
    assert region.is_pinned()
    specmoe_compile.close(model)
    assert not region.is_pinned()
