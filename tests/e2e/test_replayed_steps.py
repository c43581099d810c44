"""Steps that repeat each other call their graph without Dynamo, and see what changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

import specmoe_compile
from specmoe_compile.hf.guard_checks import EVERY, SURE
from specmoe_compile.hf.replayed_steps import CheckedStep, Replay
from specmoe_compile.system.graph_runs import GraphRun
from tests.e2e.prompt_lengths import load_plain
from tests.helpers import At, save_tiny

pytestmark = pytest.mark.usefixtures("prompts_left_to_the_model")

NEW, FEW = 3 * EVERY, SURE + 3
PROMPT = torch.arange(3, 23)[None]
CHANGE_AT = EVERY + 3
"""A step that nothing but `Replay.fits` looks at."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"), layers=2)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, device: str) -> Iterator[Any]:
    """On a CPU as traced, on a GPU in CUDA graphs."""
    torch._dynamo.reset()
    on_gpu = device == "cuda"
    model = specmoe_compile.from_pretrained(
        checkpoint,
        device=device,
        store="ram",
        expert_cache="50%" if on_gpu else None,
        progress=False,
    )
    options = {"mode": "reduce-overhead"} if on_gpu else {"lowering": "eager"}
    yield torch.compile(model, backend="specmoe", options=options)
    specmoe_compile.close(model)


@pytest.fixture
def plain(checkpoint: Path, device: str) -> Any:
    return load_plain(checkpoint, device)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of the tokens whose steps were replayed."""
    seen: list[int] = []
    run = Replay.run

    def noted(self: Replay, arguments: Any) -> Any:
        seen.append(int(arguments["position_ids"]))
        return run(self, arguments)

    monkeypatch.setattr(Replay, "run", noted)
    return seen


def generated(model: Any, *processors: LogitsProcessor, new: int = NEW, **more: Any) -> list[int]:
    out = model.generate(
        PROMPT.to(model.device),
        attention_mask=torch.ones_like(PROMPT).to(model.device),
        max_new_tokens=new,
        eos_token_id=10**6,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
        cache_implementation="static",
        **more,
    )
    tokens: list[int] = out[0].tolist()
    return tokens


@contextmanager
def traced_with(effect: Callable[[], None], module: Any) -> Iterator[None]:
    """Trace a module's forward anew, with an effect before it, and without it afterwards."""
    forward = module.forward

    def with_effect(x: Tensor) -> Tensor:
        effect()
        found: Tensor = forward(x)
        return found

    module.forward = with_effect
    torch._dynamo.reset()
    try:
        yield
    finally:
        del module.forward
        torch._dynamo.reset()


def test_steps_are_replayed_with_the_same_tokens(
    compiled: Any, plain: Any, replays: list[int]
) -> None:
    expected = generated(plain)
    assert generated(compiled) == expected
    replays.clear()
    assert generated(compiled) == expected
    steps = [position - PROMPT.shape[1] for position in replays]
    checked = {*range(SURE), *range(EVERY, NEW, EVERY)}
    assert steps == [step for step in range(NEW - 1) if step not in checked]


def test_a_weight_that_is_replaced_counts_in_the_next_step(compiled: Any, plain: Any) -> None:
    generated(compiled)

    def replace(model: nn.Module) -> Callable[[], None]:
        norm: Any = model.get_submodule("model.norm")
        like = {"dtype": norm.weight.dtype, "device": norm.weight.device}
        scale = torch.linspace(-1.0, 1.0, norm.weight.numel(), **like)
        other = nn.Parameter(norm.weight.detach() * scale, requires_grad=False)
        return lambda: setattr(norm, "weight", other)

    inner = compiled._orig_mod
    kept = inner.model.norm.weight
    expected = generated(plain, At(CHANGE_AT, replace(plain)))
    try:
        assert generated(compiled, At(CHANGE_AT, replace(inner))) == expected
    finally:
        inner.model.norm.weight = kept
    assert expected != generated(compiled), "the other weight makes no difference"


def test_a_hook_of_the_model_is_called_from_the_next_step_on(
    compiled: Any, replays: list[int]
) -> None:
    generated(compiled)
    replays.clear()
    calls: list[int] = []
    hooks: list[Any] = []

    def register() -> None:
        hook = compiled._orig_mod.register_forward_hook(lambda *_: calls.append(1))
        hooks.append(hook)

    generated(compiled, At(CHANGE_AT, register))
    hooks[0].remove()
    assert len(calls) == NEW - CHANGE_AT
    assert max(replays) < PROMPT.shape[1] + CHANGE_AT


def test_a_stance_holds_from_the_next_step_on(compiled: Any, replays: list[int]) -> None:
    expected = generated(compiled)
    replays.clear()
    try:
        found = generated(compiled, At(CHANGE_AT, lambda: torch.compiler.set_stance("force_eager")))
    finally:
        torch.compiler.set_stance("default")
    assert found == expected
    assert replays
    assert max(replays) < PROMPT.shape[1] + CHANGE_AT


def test_a_model_that_counts_its_steps_is_not_replayed(compiled: Any, replays: list[int]) -> None:
    norm = compiled._orig_mod.model.norm
    norm.steps = 0

    def count() -> None:
        norm.steps += 1

    with traced_with(count, norm):
        generated(compiled, new=FEW)
    assert norm.steps == FEW
    assert not replays


@pytest.mark.parametrize("is_new", [False, True])
def test_a_dictionary_that_gets_something_new_is_a_change(
    is_new: bool, compiled: Any, replays: list[int]
) -> None:
    norm = compiled._orig_mod.model.norm
    norm.notes = {"seen": 1}

    def note() -> None:
        norm.notes.update({"last": 2} if is_new else {})

    with traced_with(note, norm):
        generated(compiled, new=FEW)
    assert norm.notes == ({"seen": 1, "last": 2} if is_new else {"seen": 1})
    assert bool(replays) is not is_new


def test_a_step_whose_graph_gets_something_new_each_time_is_not_repeated() -> None:
    def step(tokens: Tensor, *rest: Any) -> CheckedStep | None:
        from transformers.modeling_outputs import CausalLMOutput

        logits = torch.zeros(1)
        run = GraphRun(graph, (tokens, *rest), (logits,), is_all=True)
        return CheckedStep.or_none(graph, {"input_ids": tokens}, run, CausalLMOutput(logits=logits))

    def graph() -> None: ...

    weight = torch.zeros(1)
    one, other = step(torch.zeros(1, 1), weight), step(torch.zeros(1, 1), weight)
    assert one is not None and other is not None
    assert one.fresh == (0,)
    assert one.is_repeated_by(other)
    third = step(torch.zeros(1, 1), torch.zeros(1))
    assert third is not None
    assert not other.is_repeated_by(third)
    longer = step(torch.zeros(1, 2), weight)
    assert longer is not None
    assert not one.is_repeated_by(longer)
