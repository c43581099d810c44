"""Greedy tokens of whole models are those of torch's path, in every format of `quantize=`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specmoe_compile
from specmoe_compile.hf.attach import session_of
from specmoe_compile.runtime.cpu.native import layer
from specmoe_compile.runtime.cpu.native.library import library_or_none
from tests.helpers import greedy, prompts, tiny_qwen3_moe


def tokens(quantize: str | None, *, native: bool) -> Tensor:
    """Three prompts with half of the experts in slots, computed by the engine or by torch."""
    model = tiny_qwen3_moe(layers=2, moe_intermediate_size=64)
    options: dict[str, Any] = {} if quantize is None else {"quantize": quantize}
    specmoe_compile.offload(model, store="ram", expert_cache="50%", **options)
    try:
        runners = session_of(model).engine._runners  # type: ignore[attr-defined]
        assert all((runner.native is not None) == native for runner in runners)
        with torch.no_grad():
            found: Tensor = greedy(model, prompts(3, 9), 24)
        return found
    finally:
        specmoe_compile.close(model)


@pytest.mark.parametrize("quantize", [None, "int4", "mxfp4", "fp8", "int8"])
def test_the_engine_gives_the_tokens_of_torch(
    quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library_or_none() is None:
        pytest.skip("no C++ compiler")
    expected = tokens(quantize, native=False)
    monkeypatch.setattr(layer, "MIN_RECORD_BYTES", 0)
    assert torch.equal(tokens(quantize, native=True), expected)
