"""Compiled code reaches an offloaded model through any wrapper, from any thread and process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import specmoe_compile
from specmoe_compile import backend
from specmoe_compile.hf.recompile_limit import RECOMPILE_LIMIT, raised_recompile_limit
from tests.helpers import PATIENCE_S, greedy, prompts

TOKENS = 6
STATIC = {"cache_implementation": "static"}
"""Two graphs, not three: which wrapper the model is in matters to none of them."""


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the threads that ran a compiled graph, one for each call."""
    calls: list[int] = []
    lower = backend._lower

    def counting(*args: Any) -> Callable[..., Any]:
        made = lower(*args)

        def call(*inputs: Any) -> Any:
            calls.append(threading.get_ident())
            return made(*inputs)

        return call

    monkeypatch.setattr(backend, "_lower", counting)
    return calls


def compiled(model: Any) -> Any:
    """With predictions, whose steps have more parts that calls could mix up."""
    options = {"lowering": "eager", "prefetch": True}
    return torch.compile(model, backend="specmoe", options=options)


class Wrapper(nn.Module):
    """A module around a model, as users write them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> Any:
        return self.model(ids).logits

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start `work`; its result, or the exception, will be in the list."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result


def joined(thread: threading.Thread) -> None:
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"


def test_threads_on_one_wrapper(plain: Any, offloaded: Any, compiled_calls: list[int]) -> None:
    """The first generation ends, or fails, while the second is under way."""
    wrapper = compiled(offloaded)
    one, other = prompts(1, 5), prompts(1, 5, seed=1)
    expected_one, expected_other = greedy(plain, one, 3), greedy(plain, other, 12)
    greedy(wrapper, one, 12)  # every graph is there, so that turns are short
    for fails in (False, True):
        compiled_calls.clear()
        begun, ended = threading.Event(), threading.Event()

        def hold_first(ids: Any, scores: Any, fails: bool = fails, begun: Any = begun) -> Any:
            if ids.shape[1] == 6:
                assert begun.wait(PATIENCE_S), "the other thread never had a turn"
                if fails:
                    raise RuntimeError("planted")
            return scores

        def hold_second(ids: Any, scores: Any, begun: Any = begun, ended: Any = ended) -> Any:
            if ids.shape[1] == 5:
                begun.set()
                assert ended.wait(PATIENCE_S), "the first generation did not end"
            return scores

        first, found_one = in_thread(
            lambda hold=hold_first: greedy(wrapper, one, 3, logits_processor=[hold])
        )
        second, found_other = in_thread(
            lambda hold=hold_second: greedy(wrapper, other, 12, logits_processor=[hold])
        )
        joined(first)
        ended.set()
        joined(second)
        if fails:
            assert "planted" in str(found_one[0])
        else:
            assert torch.equal(found_one[0], expected_one)
        assert torch.equal(found_other[0], expected_other)
        assert len(compiled_calls) == (2 if fails else 3) + 12, "every step is compiled"
    assert offloaded._compiled_call_impl is None, "the inner model is as it was"
    compiled_calls.clear()
    assert torch.equal(greedy(offloaded, one, 3), expected_one)
    assert compiled_calls == [], "its own generate stays eager"


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_generate_within_generate(plain: Any, offloaded: Any, compiled_calls: list[int]) -> None:
    """A logits processor that generates, with the same wrapper, and with the inner model."""
    wrapper = compiled(offloaded)
    one, other = prompts(1, 5), prompts(1, 5, seed=1)
    expected = greedy(plain, other, 3)

    def generate_too(ids: Any, scores: Any) -> Any:
        for model in (wrapper, offloaded):
            assert torch.equal(greedy(model, other, 3), expected)
        return scores

    found: list[Any] = []
    thread, found = in_thread(lambda: greedy(wrapper, one, 3, logits_processor=[generate_too]))
    joined(thread)
    assert torch.equal(found[0], greedy(plain, one, 3))
    assert offloaded._compiled_call_impl is None


def test_forward_calls_of_threads_take_turns(
    plain: Any, offloaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiled call begins before the one that runs has ended."""
    inside, most = [0], [0]
    lower = backend._lower

    def watching(*args: Any) -> Callable[..., Any]:
        made = lower(*args)

        def call(*inputs: Any) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            try:
                return made(*inputs)
            finally:
                inside[0] -= 1

        return call

    monkeypatch.setattr(backend, "_lower", watching)
    wrapper, ids = compiled(offloaded), prompts(1, 5)
    with torch.no_grad():
        expected = plain(ids).logits.argmax(-1)

    def work() -> bool:
        with torch.no_grad():
            return all(torch.equal(wrapper(ids).logits.argmax(-1), expected) for _ in range(8))

    threads = [in_thread(work) for _ in range(4)]
    for thread, found in threads:
        joined(thread)
        assert found == [True]
    assert most == [1]


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_a_module_around_the_model(
    how: str, plain: Any, offloaded: Any, compiled_calls: list[int]
) -> None:
    holder: Any = Wrapper(Wrapper(offloaded))
    ids = prompts(1, 7)
    if how == "torch.compile":
        model = compiled(holder)
    else:
        model = holder
        model.compile(backend="specmoe", options={"lowering": "eager"})
    assert torch.equal(greedy(model, ids, TOKENS, **STATIC), greedy(plain, ids, TOKENS))
    assert len(compiled_calls) == TOKENS
    assert specmoe_compile.stats(model).store == "disk", "counters are found through wrappers"


def test_a_peft_model(checkpoint: Path, offloaded: Any, compiled_calls: list[int]) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ids = prompts(1, 7)
    torch.manual_seed(3)
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), adapter).eval()
    expected = greedy(trained, None, TOKENS, input_ids=ids)
    torch.manual_seed(3)
    model = peft.get_peft_model(offloaded, adapter).eval()
    found = greedy(compiled(model), None, TOKENS, input_ids=ids, **STATIC)
    assert torch.equal(found, expected)
    assert len(compiled_calls) == TOKENS
    compiled_calls.clear()
    torch._dynamo.reset()
    model.compile(backend="specmoe", options={"lowering": "eager"})
    assert torch.equal(greedy(model, None, TOKENS, input_ids=ids, **STATIC), expected)
    assert len(compiled_calls) == TOKENS


def test_continuous_batching_warns_once(
    plain: Any, offloaded: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        type(offloaded), "init_continuous_batching", lambda model, *_, **__: made.append(model)
    )
    with caplog.at_level(logging.WARNING, logger="specmoe_compile"):
        offloaded.init_continuous_batching()
        assert caplog.messages == [], "nothing was compiled, so nothing is lost"
        wrapper = compiled(offloaded)
        for _ in range(2):
            wrapper.init_continuous_batching()
    (message,) = caplog.messages
    assert "generate_batch" in message and "Use generate()" in message
    assert made == [offloaded] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_generates(plain: Any, offloaded: Any) -> None:
    """A server that loads first and forks then; reads of the parent go on, too."""
    one, other = prompts(1, 5), prompts(1, 5, seed=9)
    expected = greedy(plain, other, 12)
    greedy(offloaded, one, 2)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(int(PATIENCE_S))
            same = torch.equal(greedy(offloaded, other, 12), expected)
            os._exit(0 if same else 3)
        assert torch.equal(greedy(offloaded, other, 12), expected)
        _, status = os.waitpid(child, 0)
    finally:
        torch.set_num_threads(threads_before)
    assert os.waitstatus_to_exitcode(status) == 0


def test_recompile_limit_is_raised_for_each_thread_and_restored() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit
    inside, leave = threading.Event(), threading.Event()

    def other() -> int:
        with raised_recompile_limit():
            inside.set()
            leave.wait(PATIENCE_S)
            return config.recompile_limit

    with raised_recompile_limit():
        thread, found = in_thread(other)
        assert inside.wait(PATIENCE_S)
        assert config.recompile_limit == RECOMPILE_LIMIT
    leave.set()
    joined(thread)
    assert found == [RECOMPILE_LIMIT]
    assert config.recompile_limit == before
