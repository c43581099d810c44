"""Decode steps that repeat each other leave Dynamo's checks out, and no other call does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_skip_guard_eval_unsafe
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

import specmoe_compile
from specmoe_compile.backend import specmoe
from specmoe_compile.hf.guard_checks import EVERY, SURE, GuardChecks, Repeats, _here
from specmoe_compile.system.graph_runs import counted
from tests.helpers import save_tiny
from tests.passes.families import tiny

NEW, FEW = 40, 4 + SURE
PROMPT = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"), layers=2)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager").eval()
    return generated(plain)


@pytest.fixture
def offloaded(checkpoint: Path) -> Iterator[Any]:
    torch._dynamo.reset()
    model = specmoe_compile.from_pretrained(checkpoint, device="cpu", store="ram", progress=False)
    yield model
    specmoe_compile.close(model)


class Noting:
    """The backend, which notes of every graph that runs whether its checks were left out."""

    def __init__(self) -> None:
        self.left_out: list[bool] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = specmoe(gm, inputs, options={"lowering": "eager", "strict": False})

        def call(*args: Any) -> Any:
            left_out = set_skip_guard_eval_unsafe(False)
            set_skip_guard_eval_unsafe(left_out)
            self.left_out.append(left_out)
            return compiled(*args)

        return call


def generated(model: Any, new: int = NEW, **kwargs: Any) -> list[int]:
    kwargs = {"cache_implementation": "static", **kwargs}
    out = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    tokens: list[int] = out[0].tolist()
    return tokens


def test_steps_of_one_generation_are_checked_now_and_then(
    offloaded: Any, expected: list[int]
) -> None:
    noting = Noting()
    compiled: Any = torch.compile(offloaded, backend=noting)
    assert generated(compiled) == expected
    assert generated(compiled) == expected
    steps = noting.left_out[-(NEW - 1) :]
    assert [at for at, left_out in enumerate(steps) if not left_out] == [
        *range(SURE),
        *range(EVERY, NEW - 1, EVERY),
    ]


def test_a_cache_that_grows_is_checked_at_every_step(offloaded: Any, expected: list[int]) -> None:
    noting = Noting()
    compiled: Any = torch.compile(offloaded, backend=noting)
    assert generated(compiled, cache_implementation=None) == expected
    assert len(noting.left_out) >= NEW - 1
    assert not any(noting.left_out)


def test_windows_are_checked_until_they_are_full(tmp_path: Path) -> None:
    window = 28  # full when the eighth new token is read
    model, _ = tiny("gpt_oss", sliding_window=window, num_hidden_layers=2)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    expected = generated(plain)
    torch._dynamo.reset()
    model = specmoe_compile.from_pretrained(tmp_path, device="cpu", store="ram", progress=False)
    noting = Noting()
    compiled: Any = torch.compile(model, backend=noting)
    assert generated(compiled) == expected
    assert generated(compiled) == expected
    steps = noting.left_out[-(NEW - 1) :]
    first = window - PROMPT.shape[1] + 1
    assert [at for at, left_out in enumerate(steps) if not left_out] == [
        *range(first + SURE),
        *range(first + EVERY, NEW - 1, EVERY),
    ]
    specmoe_compile.close(model)


class Calls(LogitsProcessor):
    """Calls the model, whose route is compiled meanwhile, with another prompt between two steps."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            self._model(input_ids=PROMPT[:, :2])
        return scores


def test_a_call_in_between_is_followed_by_one_that_is_checked(
    offloaded: Any, expected: list[int]
) -> None:
    noting = Noting()
    compiled: Any = torch.compile(offloaded, backend=noting)
    processors = LogitsProcessorList([Calls(offloaded)])
    tokens = generated(compiled, FEW, logits_processor=processors)
    assert tokens == expected[: len(tokens)]
    assert len(noting.left_out) >= 2 * (FEW - 1), "the other calls ran uncompiled"
    assert not any(noting.left_out)


def test_a_step_in_pieces_is_checked(offloaded: Any, expected: list[int]) -> None:
    layer = offloaded.model.layers[1]
    forward = layer.forward

    def in_pieces(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = in_pieces
    noting = Noting()
    compiled: Any = torch.compile(offloaded, backend=noting)
    tokens = generated(compiled, FEW)
    assert tokens == expected[: len(tokens)]
    assert len(noting.left_out) >= 2 * (FEW - 1), "the model ran in one piece"
    assert not any(noting.left_out)


def test_two_generations_in_turns_are_checked() -> None:
    checks, seen = GuardChecks(), []
    graph = counted(lambda: seen.append(_here.skips))
    one, other = Repeats(), Repeats()
    for _ in range(2 * SURE):
        for loop in (one, other):
            with loop.step(repeats=True):
                checks.run(graph)
    assert seen == [False] * 4 * SURE
    for _ in range(2 * SURE):
        with one.step(repeats=True):
            checks.run(graph)
    assert seen[4 * SURE :] == [False] * SURE + [True] * SURE


def test_a_call_that_fails_its_few_checks_is_made_again_in_full() -> None:
    checks, loop, seen = GuardChecks(), Repeats(), []

    def call() -> None:
        seen.append(_here.skips)
        if _here.skips:
            raise RuntimeError("Recompilation triggered with skip_guard_eval_unsafe stance.")

    for _ in range(SURE + 1):
        with loop.step(repeats=True):
            checks.run(counted(call) if not _here.skips else call)
    assert seen == [False] * SURE + [True, False]
