"""A decode step starts no OpenMP threads for loops that are shorter than starting them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import specmoe_compile
from tests.helpers import prompts, tiny_qwen3_moe


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Inductor asks how many there are when it decides which loops to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_decode_shares_no_short_loop() -> None:
    """The keys of a static cache, repeated for all heads, are a few thousand numbers."""
    inner = tiny_qwen3_moe(layers=1)
    specmoe_compile.offload(inner, store="ram", expert_cache="100%")
    model: Any = torch.compile(inner, backend="specmoe", options={"prefetch": False})
    _, sources = run_and_get_code(
        lambda: model.generate(
            prompts(1, 240), max_new_tokens=3, do_sample=False, cache_implementation="static"
        )
    )
    decode = [code for code in sources if "specmoe.experts" in code]
    assert decode
    assert not any("#pragma omp parallel" in code for code in decode)
