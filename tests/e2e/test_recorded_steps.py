"""On a CPU steps that repeat each other run from a recording, without Python, and see changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

import specmoe_compile
from specmoe_compile.hf.guard_checks import EVERY, SURE
from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.system.step_tape import Tape, run_recording
from tests.helpers import At, save_tiny

NEW = 2 * EVERY
PROMPT = torch.arange(3, 23)[None]
CHANGE_AT = EVERY + 4
"""A step that Dynamo does not check."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Experts that are large enough for the engine.
    return save_tiny(tmp_path_factory.mktemp("checkpoint"), layers=2, moe_intermediate_size=512)


@pytest.fixture(scope="module")
def compiled(checkpoint: Path) -> Iterator[Any]:
    if library_or_none() is None:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    model = specmoe_compile.from_pretrained(
        checkpoint, device="cpu", store="ram", expert_cache="100%", progress=False
    )
    yield torch.compile(model, backend="specmoe", options={"prefetch": False})
    specmoe_compile.close(model)


@pytest.fixture
def plain(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager").eval()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step that asked its recording, whether that ran."""
    seen: list[bool] = []
    run = Tape.run_or_none

    def noted(self: Tape, tokens: Tensor) -> list[Tensor] | None:
        results = run(self, tokens)
        seen.append(results is not None)
        return results

    monkeypatch.setattr(Tape, "run_or_none", noted)
    return seen


def generated(model: Any, *processors: LogitsProcessor, **more: Any) -> Any:
    return model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW,
        eos_token_id=10**6,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
        cache_implementation="static",
        return_dict_in_generate=True,
        **more,
    )


def tokens_of(model: Any, *processors: LogitsProcessor) -> list[int]:
    tokens: list[int] = generated(model, *processors).sequences[0].tolist()
    return tokens


def test_recorded_steps_give_the_plain_models_tokens(
    compiled: Any, plain: Any, runs: list[bool]
) -> None:
    expected = tokens_of(plain)
    assert tokens_of(compiled) == expected
    checked = {*range(SURE), *range(EVERY, NEW, EVERY)}
    # One of those that are not checked is recorded.
    assert runs == [True] * (NEW - 1 - len(checked) - 1)


def test_logits_of_earlier_steps_stay(compiled: Any, plain: Any, runs: list[bool]) -> None:
    found = generated(compiled, output_logits=True).logits
    wanted = generated(plain, output_logits=True).logits
    assert runs and len(found) == len(wanted)
    for own, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-4)


def test_memory_of_a_weight_that_is_replaced_is_not_read(
    compiled: Any, plain: Any, runs: list[bool]
) -> None:
    tokens_of(compiled)
    runs.clear()

    def replace(model: nn.Module) -> Any:
        weight: Any = model.get_submodule("model.norm").weight
        other = weight.detach() * torch.linspace(-1.0, 1.0, weight.numel())

        def act() -> None:
            weight.data = other  # the same object, with other memory

        return act

    inner = compiled._orig_mod
    kept = inner.model.norm.weight.detach().clone()
    expected = tokens_of(plain, At(CHANGE_AT, replace(plain)))
    try:
        assert tokens_of(compiled, At(CHANGE_AT, replace(inner))) == expected
    finally:
        inner.model.norm.weight.data = kept
    assert False in runs
    assert expected != tokens_of(compiled), "the other weight makes no difference"


def test_a_profiler_sees_the_steps(compiled: Any, runs: list[bool]) -> None:
    expected = tokens_of(compiled)
    runs.clear()
    with torch.profiler.profile() as profile:
        assert tokens_of(compiled) == expected
    assert runs and not any(runs)
    assert any(event.key == "specmoe::experts" for event in profile.key_averages())


def test_what_inductor_did_not_compile_is_run_and_not_recorded() -> None:
    tokens = torch.ones(1, 1, dtype=torch.long)
    results, tape = run_recording(lambda ids: (ids + 1,), (tokens,), tokens)
    assert tape is None and results[0].item() == 2


def test_code_with_another_op_is_run_and_not_recorded() -> None:
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    def body(ids: Tensor, weight: Tensor) -> list[Tensor]:
        return [torch.mm(weight[:1] * ids, weight)]

    tokens, weight = torch.ones(1, 1), torch.randn(8, 8)
    with torch.no_grad():
        graph: Any = compile_fx(make_fx(body)(tokens, weight), [tokens, weight])
        results, tape = run_recording(graph, (tokens, weight), tokens)
        again, _ = run_recording(graph, (tokens, weight), tokens)
    assert tape is None
    torch.testing.assert_close(results[0], weight[:1] @ weight)
    torch.testing.assert_close(again[0], weight[:1] @ weight)
