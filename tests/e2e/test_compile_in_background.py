"""Decode steps run as the model is until another thread has compiled them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import specmoe_compile
from specmoe_compile import backend
from specmoe_compile.errors import CompileError
from specmoe_compile.hf.background import THREAD_NAME
from specmoe_compile.hf.run_ahead import generation_stats
from specmoe_compile.options import CompileOptions
from specmoe_compile.runtime.session import session_of
from specmoe_compile.system.graph_runs import graphs_run
from tests.helpers import prompts, tiny_qwen3_moe

NEW, PLAIN = 24, 5
"""Tokens, and the one before which the streamer waits for the thread."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> Iterator[Any]:
    model = tiny_qwen3_moe(layers=2)
    specmoe_compile.offload(model, store="ram", device="cpu", expert_cache="50%", progress=False)
    yield model
    specmoe_compile.close(model)


class Streamer:
    """Waits for the thread that compiles, once, before a token."""

    def __init__(self) -> None:
        self.seen = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == PLAIN + 1:  # the prompt comes first
            for thread in compiling():
                thread.join()

    def end(self) -> None:
        pass


def compiling() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def in_background(model: Any) -> Any:
    return torch.compile(model, backend="specmoe", options={"compile_in_background": True})


def generated(model: Any, length: int, **how: Any) -> list[int]:
    tokens = prompts(1, length)
    how = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0} | how
    out: torch.Tensor = model.generate(tokens, max_new_tokens=NEW, min_new_tokens=NEW, **how)
    return out[0].tolist()


@pytest.mark.parametrize("length", [20, 6], ids=["long", "short"])
def test_steps_are_plain_until_they_are_compiled(model: Any, length: int) -> None:
    want = generated(model, length)
    compiled, before = in_background(model), graphs_run()
    assert generated(compiled, length, streamer=Streamer()) == want
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # The prompt makes the first token, and one step more is launched than tokens are read before.
    assert generation_stats(session_of(model)).plain == PLAIN - 1
    assert graphs_run() - before == NEW - PLAIN
    assert generated(compiled, length) == want
    assert counters["stats"]["unique_graphs"] == 1, "the next call finds the graph"
    assert generation_stats(session_of(model)).plain == PLAIN - 1


def test_random_numbers_are_drawn_as_ever(model: Any) -> None:
    def drawn(model: Any) -> list[int]:
        torch.manual_seed(3)
        return generated(model, 20, do_sample=True)

    assert drawn(in_background(model)) == drawn(model)
    assert generation_stats(session_of(model)).plain == 0


def test_what_cannot_be_compiled_reaches_the_caller(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise CompileError("no")

    monkeypatch.setattr(backend, "_lower", fail)
    with pytest.raises(Exception, match="no"):
        generated(in_background(model), 20, streamer=Streamer())
    assert generation_stats(session_of(model)).plain == PLAIN - 1
    assert not compiling()


def test_other_steps_wait(model: Any) -> None:
    generated(in_background(model), 20, cache_implementation="dynamic")
    generated(torch.compile(model, backend="specmoe"), 20)
    assert generation_stats(session_of(model)).plain == 0 and not compiling()


@pytest.mark.parametrize(
    "other", [{"lowering": "eager"}, {"compile_prefill": True}, {"default_vectors": "vectors"}]
)
def test_options_that_compile_before_the_prompt_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"compile_in_background=True needs {next(iter(other))}="):
        CompileOptions.from_kwargs({"compile_in_background": True, **other})
