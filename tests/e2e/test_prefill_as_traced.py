"""A prompt runs as it was traced; Inductor compiles it only where it is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import compile_fx
from torch.fx import GraphModule

import specmoe_compile
from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.passes.outline_experts import find_dispatch_nodes
from tests.helpers import prompts, tiny_qwen3_moe


@pytest.fixture
def compiled_lengths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each graph that Inductor is given, which runs as traced here."""
    found: list[int] = []

    def compile_nothing(gm: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        first: Any = find_dispatch_nodes(gm.graph)[0]
        found.append(int(first.args[1].meta["example_value"].shape[0]))
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_nothing)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "length", "compiled"),
    [
        ({}, MAX_DECODE_TOKENS + 1, []),
        ({"compile_prefill": True}, MAX_DECODE_TOKENS + 1, [MAX_DECODE_TOKENS + 1]),
        ({}, MAX_DECODE_TOKENS, [MAX_DECODE_TOKENS]),
    ],
)
@torch.no_grad()
def test_what_inductor_compiles(
    compiled_lengths: list[int], options: dict[str, Any], length: int, compiled: list[int]
) -> None:
    model = tiny_qwen3_moe(layers=2)
    ids = prompts(1, length)
    want = model(ids).logits
    specmoe_compile.offload(model, store="ram", device="cpu", progress=False)
    try:
        got = torch.compile(model, backend="specmoe", options=options)(ids).logits
    finally:
        specmoe_compile.close(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert compiled_lengths == compiled
