"""Commands decode in CUDA graphs where that is possible and nobody said otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import specmoe_compile
from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.bench.cuda_graphs import with_cuda_graphs
from specmoe_compile.cli import generate as command
from specmoe_compile.options import CompileOptions
from tests.helpers import save_tiny

GRAPHS = {"mode": "reduce-overhead"}


@pytest.mark.parametrize(
    "given", [{}, {"prefetch": False}, {"transfer": "gather"}, {"transfer": "auto"}]
)
@pytest.mark.parametrize("store", ["ram", None])
def test_on_a_gpu_with_experts_in_ram_or_all_in_slots(
    store: str | None, given: dict[str, Any]
) -> None:
    options = with_cuda_graphs(
        given, device=torch.device("cuda", 0), store=store, kv_cache="static"
    )
    assert options == {**given, **GRAPHS}
    assert CompileOptions.from_kwargs(options).mode == "reduce-overhead"


@pytest.mark.parametrize(
    "given", [{"mode": "default"}, {"transfer": "copy"}, {"lowering": "eager"}, GRAPHS]
)
def test_what_was_asked_for_stays(given: dict[str, Any]) -> None:
    kept = with_cuda_graphs(given, device=torch.device("cuda"), store="ram", kv_cache="static")
    assert kept == given


@pytest.mark.parametrize(
    ("device", "store", "kv_cache"),
    [("cpu", "ram", "static"), ("cuda", "disk", "static"), ("cuda", "ram", "dynamic")],
)
def test_where_no_graph_is_possible(device: str, store: str, kv_cache: str) -> None:
    options = with_cuda_graphs(
        {"prefetch": True}, device=torch.device(device), store=store, kv_cache=kv_cache
    )
    assert options == {"prefetch": True}


def test_a_prompt_is_where_the_model_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tensor without contents stands for one on a GPU."""
    build_tokenizer(256).save_pretrained(save_tiny(tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    inner = SimpleNamespace(device=torch.device("meta"), config=config)
    monkeypatch.setattr(specmoe_compile, "from_pretrained", lambda *_, **__: inner)
    monkeypatch.setattr(command, "fetched_from", lambda _: "ram")

    class StreamedError(Exception):
        pass

    def stream(_: Any, __: Any, ids: torch.Tensor, *___: Any, **____: Any) -> None:
        assert ids.device == inner.device and ids.shape == (1, 5)
        raise StreamedError

    monkeypatch.setattr(command, "stream", stream)
    with pytest.raises(StreamedError):
        command.generate(str(tmp_path), prompt="HELLO", compile=False)
