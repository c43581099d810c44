"""`generate` of an offloaded model runs the compiled graph, and gives the unmodified tokens."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from specmoe_compile import backend
from specmoe_compile.errors import SpecMoEError
from specmoe_compile.hf import compiled_calls
from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS
from specmoe_compile.options import MAX_DECODE_TOKENS
from tests.helpers import greedy, prompts

NEW_TOKENS = 10


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Counts compiled graphs and the calls of compiled graphs."""
    counter: collections.Counter[str] = collections.Counter()
    lower = backend._lower

    def counting_lower(*args: Any) -> Any:
        compiled = lower(*args)
        counter["graphs"] += 1

        @functools.wraps(compiled)
        def call(*inputs: Any) -> Any:
            counter["calls"] += 1
            return compiled(*inputs)

        return call

    monkeypatch.setattr(backend, "_lower", counting_lower)
    return counter


def left_padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left; row 0 has no padding."""
    ids = prompts(batch, length)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, :row] = 0
        mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("cache", "lowering", "prompt"),
    [
        ("dynamic", "eager", 7),
        # A prompt of more tokens than a decode step has is not for Inductor.
        ("static", "inductor", 20),
        pytest.param("static", "inductor", 7, marks=pytest.mark.slow),
        pytest.param("dynamic", "inductor", 7, marks=pytest.mark.slow),
    ],
)
def test_every_forward_step_of_generate_is_compiled(
    cache: str,
    lowering: str,
    prompt: int,
    plain: Any,
    offloaded: Any,
    counts: collections.Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[bool] = []
    run = compiled_calls.ModelCalls.run

    def noting(calls: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS))
        return run(calls, *args, **kwargs)

    monkeypatch.setattr(compiled_calls.ModelCalls, "run", noting)
    ids = prompts(1, prompt)
    steps = NEW_TOKENS if prompt <= MAX_DECODE_TOKENS else NEW_TOKENS - 1
    kwargs = {} if cache == "dynamic" else {"cache_implementation": "static"}
    compiled = torch.compile(offloaded, backend="specmoe", options={"lowering": lowering})
    torch._dynamo.utils.counters.clear()
    tokens = greedy(compiled, ids, NEW_TOKENS, **kwargs)
    assert torch.equal(tokens, greedy(plain, ids, NEW_TOKENS))
    assert counts["calls"] == steps
    assert kept == [True] * NEW_TOKENS, "caches are known by their name"
    assert not torch._dynamo.utils.counters["graph_break"]
    graphs = counts["graphs"]
    counts["calls"] = 0
    again = greedy(compiled, ids, NEW_TOKENS, **kwargs)
    assert torch.equal(again, tokens)
    assert counts["graphs"] == graphs, "a second generate must compile nothing new"
    assert counts["calls"] == steps
    counts.clear()
    greedy(offloaded, ids, 2)
    assert counts["calls"] == 0, "generate of the inner model stays eager"
    assert compiled._orig_mod is offloaded


@pytest.mark.parametrize(
    ("batch", "cache", "lowering"),
    [
        (2, "dynamic", "eager"),
        (3, "static", "eager"),
        pytest.param(3, "static", "inductor", marks=pytest.mark.slow),
        pytest.param(4, "dynamic", "inductor", marks=pytest.mark.slow),
    ],
)
def test_batches_with_left_padding_match_greedily_and_sampled(
    batch: int, cache: str, lowering: str, plain: Any, offloaded: Any
) -> None:
    inputs = left_padded(batch, 8)
    kwargs = {} if cache == "dynamic" else {"cache_implementation": "static"}
    want = plain.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    options = {"lowering": lowering, "prefetch": True}
    compiled = torch.compile(offloaded, backend="specmoe", options=options)
    got = compiled.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
    assert torch.equal(got, want)
    sampled = []
    for model in (plain, compiled):
        torch.manual_seed(7)
        sampled.append(
            model.generate(**inputs, **kwargs, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=20)
        )
    assert torch.equal(*sampled), "sampling draws the same tokens"


def test_eager_offloaded_generate_matches(plain: Any, offloaded: Any) -> None:
    ids = prompts(2, 6)
    assert torch.equal(greedy(offloaded, ids, NEW_TOKENS), greedy(plain, ids, NEW_TOKENS))


def test_compile_in_place_matches(
    plain: Any, offloaded: Any, counts: collections.Counter[str]
) -> None:
    ids = prompts(1, 6)
    offloaded.compile(backend="specmoe", options={"lowering": "eager"})
    tokens = greedy(offloaded, ids, NEW_TOKENS, cache_implementation="static")
    assert torch.equal(tokens, greedy(plain, ids, NEW_TOKENS))
    assert counts["calls"] == NEW_TOKENS


@pytest.mark.parametrize(
    ("cache", "lowering"),
    [
        ("static", "eager"),
        pytest.param("static", "inductor", marks=pytest.mark.slow),
        pytest.param("dynamic", "inductor", marks=pytest.mark.slow),
    ],
)
def test_plain_model_compiled_in_place_matches(
    cache: str, lowering: str, checkpoint: Path, plain: Any, counts: collections.Counter[str]
) -> None:
    ids = prompts(2, 6)
    kwargs = {} if cache == "dynamic" else {"cache_implementation": "static"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.compile(backend="specmoe", options={"lowering": lowering})
    assert torch.equal(greedy(model, ids, NEW_TOKENS, **kwargs), greedy(plain, ids, NEW_TOKENS))
    assert counts["calls"] == NEW_TOKENS


def test_plain_model_compiled_forward_matches(checkpoint: Path, plain: Any) -> None:
    ids = prompts(2, 9)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        want = plain(ids).logits
        got = torch.compile(model, backend="specmoe", fullgraph=True)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_plain_model_with_gradients_is_refused(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with pytest.raises(Exception, match="inference only"):
        torch.compile(model, backend="specmoe")(prompts(1, 5))


def test_offloaded_model_refuses_training(offloaded: Any) -> None:
    with pytest.raises(SpecMoEError, match="inference only"):
        offloaded.train()
    assert offloaded.eval() is offloaded


def test_gradients_through_experts_are_refused(offloaded: Any) -> None:
    embeddings = torch.randn(1, 4, 64, requires_grad=True)
    with pytest.raises(SpecMoEError, match=r"torch\.no_grad"):
        offloaded(inputs_embeds=embeddings)


def test_saving_refuses_and_leaves_nothing(offloaded: Any, tmp_path: Path) -> None:
    for save in (
        lambda: offloaded.save_pretrained(tmp_path / "copy"),
        lambda: torch.save(offloaded.state_dict(), tmp_path / "copy.pt"),
        lambda: torch.save(offloaded.model.state_dict(), tmp_path / "copy.pt"),
        lambda: save_file(offloaded.state_dict(), tmp_path / "copy.safetensors"),
        lambda: {name: value.clone() for name, value in offloaded.state_dict().items()},
    ):
        with pytest.raises(SpecMoEError, match="checkpoint without experts"):
            save()
    assert not (tmp_path / "copy").exists() and not (tmp_path / "copy.safetensors").exists()
    state = offloaded.state_dict()
    assert torch.equal(state["lm_head.weight"], offloaded.lm_head.weight)
    assert state["model.layers.0.mlp.experts.down_proj"].shape == (0, 64, 32)


def test_copies_and_casts_are_refused_before_anything_changes(offloaded: Any) -> None:
    for copy_it in (copy.deepcopy, pickle.dumps):
        for part in (offloaded, offloaded.model.layers[0].mlp.experts):
            with pytest.raises(SpecMoEError, match="cannot be copied or pickled"):
                copy_it(part)
    holder = torch.nn.ModuleList([offloaded])
    for cast in (
        lambda: offloaded.to(torch.bfloat16),
        lambda: offloaded.to(dtype=torch.float64),
        offloaded.half,
        holder.bfloat16,
        lambda: offloaded.to("meta"),
        offloaded.model.layers[1].half,
    ):
        with pytest.raises(SpecMoEError, match=r"an offloaded model stay torch\.float32"):
            cast()
        assert {p.dtype for p in offloaded.parameters()} == {torch.float32}
        assert {p.device.type for p in offloaded.parameters()} == {"cpu"}
    assert offloaded.to("cpu") is offloaded and offloaded.float() is offloaded
    offloaded.lm_head.to(torch.float32)


def test_dense_model_is_refused_when_strict() -> None:
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(Exception, match="calls no experts module"):
        torch.compile(layer, backend="specmoe")(torch.zeros(1, 4))


def test_dense_model_is_lowered_untouched_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(3, 4)
    backend._warned.clear()
    compiled = torch.compile(layer, backend="specmoe", options={"strict": False})
    torch.testing.assert_close(compiled(x), layer(x))
    assert "calls no experts module" in caplog.text


def test_unknown_option_is_one_sentence(offloaded: Any) -> None:
    compiled = torch.compile(offloaded, backend="specmoe", options={"polcy": "exact"})
    with pytest.raises(Exception, match="unknown specmoe option 'polcy'"):
        greedy(compiled, prompts(1, 5), 2)
