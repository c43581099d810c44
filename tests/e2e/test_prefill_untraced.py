"""A prompt reaches neither Dynamo nor Inductor, unless it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

import specmoe_compile
from specmoe_compile import backend
from specmoe_compile.hf import prompts as prompts_module
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.hf.prompts import prompts_as_they_are
from specmoe_compile.options import MAX_DECODE_TOKENS, CompileOptions
from specmoe_compile.system.inductor import start_compile_workers
from tests.helpers import prompts, tiny_qwen3_moe

LONG, SHORT = MAX_DECODE_TOKENS + 1, MAX_DECODE_TOKENS
GROWS = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 12),
    reason="the C++ that torch 2.11's Inductor writes for a growing cache does not compile",
)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    torch._dynamo.reset()
    counters.clear()
    model = tiny_qwen3_moe(layers=2)
    specmoe_compile.offload(model, store="ram", device="cpu", progress=False)
    yield model
    specmoe_compile.close(model)
    torch._dynamo.reset()


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided for Inductor holds, and the graphs, which are only counted, run as traced."""
    lower = backend._lower

    def lower_eagerly(gm: Any, inputs: Any, config: CompileOptions, speculation: Any) -> Any:
        return lower(gm, inputs, replace(config, lowering="eager"), speculation)

    monkeypatch.setattr(backend, "_lower", lower_eagerly)


def graphs() -> int:
    """How many graphs Dynamo has traced."""
    return int(counters["stats"]["unique_graphs"])


def static(model: Any) -> dict[str, Any]:
    """A new static cache, as the argument of `forward`."""
    return cache_argument(model, StaticCache(config=model.config, max_cache_len=2 * LONG))


def wrapped(model: nn.Module, **arguments: Any) -> Any:
    return torch.compile(model, backend="specmoe", **arguments)


def in_place(model: nn.Module, **arguments: Any) -> Any:
    model.compile(backend="specmoe", **arguments)
    return model


def in_a_module(model: nn.Module, **arguments: Any) -> Any:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return self.model(input_ids, **kwargs)

    return torch.compile(Holder(), backend="specmoe", **arguments)


@pytest.mark.parametrize("length", [LONG, SHORT, 2])
@pytest.mark.parametrize("compiled_as", [wrapped, in_place, in_a_module])
@torch.no_grad()
def test_a_prompt_is_not_traced(model: nn.Module, compiled_as: Any, length: int) -> None:
    want = model(prompts(1, length), **static(model)).logits
    compiled = compiled_as(model, options={"compile_prefill": False})
    got = compiled(prompts(1, length), **static(model)).logits
    assert graphs() == 0
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.usefixtures("no_code")
@torch.no_grad()
def test_the_compiler_is_asked_when_the_first_step_is_traced(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []
    monkeypatch.setattr(prompts_module, "ask_compiler_ahead", lambda: traced.append(graphs()))
    compiled = wrapped(model, options={"lowering": "inductor"})
    cache = static(model)
    compiled(prompts(1, LONG), **cache)
    assert not traced, "the prompt has both cores"
    compiled(prompts(1, 1), **cache)
    assert traced == [0]


@torch.no_grad()
def test_a_prompt_has_free_cores_and_the_first_step_a_light_collector(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        inside.append(f"{name} begins")
        yield
        inside.append(f"{name} ends after {graphs()} graphs")

    cores = SimpleNamespace(used=lambda: noted("cores"))
    monkeypatch.setattr(prompts_module, "free_cores", cores)
    monkeypatch.setattr(prompts_module, "old_objects_frozen", lambda: noted("collector"))
    compiled = wrapped(model, options={"lowering": "inductor"})
    cache = static(model)
    for length in (LONG, 1, 1):
        compiled(prompts(1, length), **cache)
    assert inside == [
        "cores begins",
        "cores ends after 0 graphs",
        "collector begins",
        "collector ends after 1 graphs",
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_compile_workers_start_before_the_first_step_is_traced(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(prompts_module, "start_compile_workers", lambda: started.append("workers"))
    monkeypatch.setattr(prompts_module, "ask_compiler_ahead", lambda: started.append("compiler"))
    monkeypatch.setattr(prompts_module, "_runs_as_traced", lambda _: True)
    monkeypatch.setattr(prompts_module, "with_prefetch_decided", lambda options, _: options)
    session: Any = SimpleNamespace(
        device=torch.device(device), engine=None, configure=lambda _: None
    )
    call = prompts_as_they_are(
        lambda **_: started.append("compiled"),
        lambda **_: started.append("plain"),
        options=CompileOptions(),
        session=session,
    )
    with torch.no_grad():
        for length in (LONG, 1, 1):
            call(input_ids=prompts(1, length), past_key_values=SimpleNamespace(is_compileable=True))
    first = "workers" if device == "cuda" else "compiler"
    assert started == ["plain", first, "compiled", "compiled"]


def test_compile_workers_are_pytorchs_and_start_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import async_compile

    started: list[int] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(1))
    start_compile_workers.cache_clear()
    try:
        start_compile_workers()
        start_compile_workers()
    finally:
        start_compile_workers.cache_clear()
    assert started == [1]


@pytest.mark.parametrize(
    ("length", "options", "is_static"),
    [
        (LONG, {"lowering": "eager"}, True),
        (SHORT, {"lowering": "eager"}, True),
        (LONG, {}, False),
    ],
)
@torch.no_grad()
def test_what_is_traced(
    model: nn.Module, length: int, options: dict[str, Any], is_static: bool
) -> None:
    cache = static(model) if is_static else {}
    wrapped(model, options=options)(prompts(1, length), **cache)
    assert graphs() == 1


@pytest.mark.usefixtures("no_code")
@torch.no_grad()
def test_what_follows_a_prompt_is_traced(model: nn.Module) -> None:
    """Several tokens at once, as assisted generation checks them, come again and again."""
    cache, compiled = static(model), wrapped(model, options={"lowering": "inductor"})
    compiled(prompts(1, 3), **cache)
    assert graphs() == 0
    compiled(prompts(1, 3), **cache)
    assert graphs() == 1


def graphs_by_token(model: Any, tokens: int, **settings: Any) -> list[int]:
    """Of `generate`: how many graphs were traced when the prompt was read, and at each token."""
    seen: list[int] = []

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            seen.append(graphs())

        def end(self) -> None:
            pass

    compiled = wrapped(model)
    given = prompts(1, LONG)
    settings = {"max_new_tokens": tokens, "do_sample": False, **settings}
    got = compiled.generate(given, streamer=Streamer(), **settings)
    want = model.generate(given, **settings)
    assert torch.equal(got, want)
    return seen


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=GROWS)])
@torch.no_grad()
def test_generate_traces_the_decode_step_alone(model: Any, cache: str) -> None:
    seen = graphs_by_token(model, 4, cache_implementation=cache)
    assert seen == [0, 0, 1, 1, 1]  # the prompt, its token, and those of three decode steps


@GROWS
@pytest.mark.usefixtures("no_code")
@torch.no_grad()
def test_layers_that_count_learn_from_the_prompt() -> None:
    torch._dynamo.reset()
    counters.clear()
    model: Any = tiny_qwen3_moe(layers=2, sliding_window=2 * LONG, use_sliding_window=True)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    specmoe_compile.offload(model, store="ram", device="cpu", progress=False)
    assert graphs_by_token(model, 4)[:2] == [0, 1]
    specmoe_compile.close(model)
    torch._dynamo.reset()


@torch.enable_grad()
def test_with_gradients_a_prompt_is_traced(model: nn.Module) -> None:
    """The backend may have to refuse it."""
    wrapped(model, options={})(prompts(1, LONG), **static(model))
    assert graphs() == 1


@torch.no_grad()
def test_a_wrong_option_is_said_before_the_prompt(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="unknown specmoe option 'policyy'"):
        wrapped(model, options={"policyy": "exact"})(prompts(1, LONG), **static(model))


@torch.no_grad()
def test_the_session_is_told_of_the_options_before_the_prompt(model: nn.Module) -> None:
    session = session_of(model)
    wrapped(model, options={"auto_off": False})(prompts(1, LONG), **static(model))
    assert session.speculation is not None
    assert session.speculation.auto_off is False


@torch.no_grad()
def test_another_backend_traces_as_ever(model: nn.Module) -> None:
    torch.compile(model, backend="eager")(prompts(1, LONG))
    assert graphs() >= 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@torch.no_grad()
def test_a_prompt_is_not_traced_on_any_device(device: str) -> None:
    told: list[Any] = []
    engine = SimpleNamespace(fetches=True, prefetch_pays=True)
    session: Any = SimpleNamespace(
        device=torch.device(device), configure=told.append, engine=engine
    )

    def ways(*lengths: int, held: int, **options: Any) -> list[Any]:
        cache = SimpleNamespace(is_compileable=True, get_seq_length=lambda: held)
        call = prompts_as_they_are(
            lambda *_, **__: "compiled",
            lambda *_, **__: "plain",
            options=CompileOptions(mode="reduce-overhead", **options),
            session=session,
        )
        return [call(prompts(1, length), past_key_values=cache) for length in lengths]

    assert ways(1, SHORT, LONG, held=0) == ["compiled", "plain", "plain"]
    assert ways(1, SHORT, LONG, held=5) == ["compiled", "compiled", "plain"]
    assert ways(1, SHORT, LONG, held=0, policy="commit") == ["compiled", "compiled", "plain"]
    assert [one.captures for one in told] == [True, True, True]
