"""`generate` with the next step launched early gives what transformers' own loop gives.

The model is not compiled here; launching early on the CPU costs a step and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import specmoe_compile
from specmoe_compile.api import reset_stats
from specmoe_compile.hf import run_ahead
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.hf.step_inputs import StepInputs, cache_of
from specmoe_compile.reference_model import CHECKPOINT_DIR
from tests.helpers import prompts, save_tiny
from tests.passes.families import tiny

NEW = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def offloaded(checkpoint: Path) -> Iterator[Any]:
    model = specmoe_compile.from_pretrained(checkpoint, device="cpu", store="ram", progress=False)
    yield model
    specmoe_compile.close(model)


@pytest.fixture(params=["early", "in turn"])
def early(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are launched before the token is read, as on a GPU."""
    monkeypatch.setattr(run_ahead, "runs_ahead_on", lambda device: request.param == "early")
    return bool(request.param == "early")


class Streamer(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


class Penalty(LogitsProcessor):
    """Reads every token on the host."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        scores[:, input_ids[0, -1].item()] -= 5.0
        return scores


class AfterSix(StoppingCriteria):
    """Stops by a count of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 6)


def both(plain: Any, offloaded: Any, batch: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    """The same call of both models, from the same seed; the seed's state must end the same."""
    results = []
    for model in (plain, offloaded):
        torch.manual_seed(7)
        given = {key: value() if callable(value) else value for key, value in kwargs.items()}
        arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **given}
        result = model.generate(prompts(batch, 5), **arguments)
        results.append((result, torch.rand(1)))
    (wanted, want_next), (found, found_next) = results
    assert torch.equal(want_next, found_next), "random numbers are drawn as often"
    return wanted, found


def eos_of(plain: Any, batch: int = 1, place: int = 4) -> int:
    """A token that greedy decoding gives after a few others."""
    tokens = plain.generate(prompts(batch, 5), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return int(tokens[0, 5 + place])


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "batch": {"batch": 3},
    "static_batch": {"batch": 3, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9},
    "sampling_batch": {"do_sample": True, "batch": 2, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "settings": {"generation_config": lambda: GenerationConfig(do_sample=True, pad_token_id=0)},
    "time": {"max_time": 1000.0},
    "criterion": {"stopping_criteria": lambda: StoppingCriteriaList([AfterSix()])},
    "host_processor": {"logits_processor": lambda: LogitsProcessorList([Penalty()])},
}


@pytest.mark.parametrize("name", CALLS)
def test_tokens_and_random_numbers_are_those_of_generate(
    plain: Any, offloaded: Any, early: bool, name: str
) -> None:
    kwargs = dict(CALLS[name])
    wanted, found = both(plain, offloaded, kwargs.pop("batch", 1), **kwargs)
    assert torch.equal(wanted, found)
    stats = specmoe_compile.stats(offloaded).generation
    assert stats.reason is None


@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_that_ends_the_text(plain: Any, offloaded: Any, early: bool, batch: int) -> None:
    eos = eos_of(plain, batch)
    reset_stats(offloaded)
    streamers = [Streamer(), Streamer()]
    given = iter(streamers)
    kwargs: dict[str, Any] = {} if batch > 1 else {"streamer": lambda: next(given)}
    wanted, found = both(plain, offloaded, batch, eos_token_id=eos, **kwargs)
    assert torch.equal(wanted, found) and (batch > 1 or wanted.shape[1] < 5 + NEW)
    if batch == 1:
        assert streamers[0].given == streamers[1].given and streamers[1].ended == 1
        stats = specmoe_compile.stats(offloaded).generation
        assert stats.tokens == found.shape[1] - 5
        assert (stats.dropped, stats.ahead) == ((1, stats.tokens - 1) if early else (0, 0))


def test_a_string_that_ends_the_text(plain: Any, offloaded: Any, early: bool) -> None:
    words = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    string = words.decode([eos_of(plain)])
    for given in (
        {"stop_strings": string},
        {
            "generation_config": GenerationConfig(
                stop_strings=[string], max_new_tokens=NEW, pad_token_id=0
            )
        },
    ):
        wanted, found = both(plain, offloaded, tokenizer=lambda: words, **given)
        assert torch.equal(wanted, found) and wanted.shape[1] < 5 + NEW


def test_a_length_is_known_beforehand(plain: Any, offloaded: Any, early: bool) -> None:
    reset_stats(offloaded)
    both(plain, offloaded)
    stats = specmoe_compile.stats(offloaded).generation
    assert (stats.tokens, stats.dropped) == (NEW, 0)
    assert stats.ahead == (NEW - 1 if early else 0)


def test_who_streams_has_the_first_token_before_the_first_step(
    checkpoint: Path, early: bool
) -> None:
    """It may compile; from then on steps are launched before their token is given."""
    model = specmoe_compile.from_pretrained(checkpoint, device="cpu", store="ram", progress=False)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))

    class Counts(BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.append(len(calls))

        def end(self) -> None:
            pass

    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = []
    for _ in range(2):
        seen: list[int] = []
        calls.clear()
        model.generate(prompts(1, 5), streamer=Counts(), **arguments)
        found.append(seen)
    specmoe_compile.close(model)
    later = [0, 2, 3, 4, 4] if early else [0, 1, 2, 3, 4]
    assert found == [[0, 1, 3, 4, 4] if early else later, later]


@pytest.mark.parametrize("static", [True, False])
def test_a_kept_cache_forgets_the_step_too_many(
    plain: Any, offloaded: Any, early: bool, static: bool
) -> None:
    eos = eos_of(plain)
    found = []
    for model in (plain, offloaded):
        kwargs: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
        if static:
            cache = StaticCache(config=model.config, max_cache_len=32)
            kwargs |= cache_argument(model, cache)
        out = model.generate(
            prompts(1, 5),
            max_new_tokens=NEW,
            eos_token_id=eos,
            pad_token_id=0,
            do_sample=False,
            **kwargs,
        )
        kept = cache_of(out)
        length = int(kept.get_seq_length())
        more = model.generate(
            out.sequences,
            max_new_tokens=3,
            pad_token_id=0,
            do_sample=False,
            eos_token_id=None,
            **cache_argument(model, kept),
        )
        found.append((out, length, more))
    (want, want_length, want_more), (got, got_length, got_more) = found
    assert torch.equal(want.sequences, got.sequences) and want_length == got_length
    torch.testing.assert_close(want.scores, got.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(want_more, got_more)


def test_a_processor_on_the_host_sees_what_it_would_have_seen(
    plain: Any, offloaded: Any, early: bool
) -> None:
    seen = []
    for model in (plain, offloaded):
        processor = Penalty()
        model.generate(
            prompts(1, 5),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([processor]),
        )
        seen.append(processor.seen)
    assert seen[0] == seen[1] and len(seen[0]) == NEW


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"num_beams": 2}, "neither takes"),
        ({"use_cache": False}, "no cache"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "records"),
        ({"prompt_lookup_num_tokens": 2}, "neither takes"),
    ],
)
def test_other_calls_take_the_way_of_transformers(
    plain: Any, offloaded: Any, kwargs: dict[str, Any], reason: str
) -> None:
    wanted, found = both(plain, offloaded, **kwargs)
    wanted, found = (getattr(out, "sequences", out) for out in (wanted, found))
    assert torch.equal(wanted, found)
    assert reason in str(specmoe_compile.stats(offloaded).generation.reason)


@pytest.mark.parametrize(
    ("family", "changes", "padded", "advances"),
    [
        ("qwen3_moe", {}, True, True),
        ("gpt_oss", {"sliding_window": 8}, False, True),
        ("gpt_oss", {"sliding_window": 8}, True, False),
        ("mixtral", {"sliding_window": 8}, False, True),
    ],
)
def test_inputs_that_are_advanced_are_those_that_would_be_made(
    family: str, changes: dict[str, Any], padded: bool, advances: bool
) -> None:
    model, _ = tiny(family, **changes)
    tokens = prompts(2, 6)
    padding = torch.ones(2, 5, dtype=torch.long)
    if padded:
        padding[0, :2] = 0
    cache = StaticCache(config=model.config, max_cache_len=20)
    kwargs: dict[str, Any] = {
        **cache_argument(model, cache),
        "attention_mask": padding,
        "position_ids": torch.arange(5).expand(2, 5),
        "use_cache": True,
    }
    steps = StepInputs(model)
    _fill(cache, model, 5)
    for length in range(6, 16):
        kwargs = model._update_model_kwargs_for_generation({}, kwargs)
        want = model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **kwargs)
        found = steps.make(tokens, kwargs)
        assert found.keys() == want.keys() and steps.advances == advances
        for name in ("input_ids", "position_ids", "attention_mask"):
            torch.testing.assert_close(found[name], want[name], rtol=0, atol=0)
        _fill(cache, model, 1)
        tokens = torch.cat([tokens, tokens[:, length - 6 : length - 5]], dim=1)


def _fill(cache: Any, model: Any, count: int) -> None:
    """Add so many tokens to every layer of a cache."""
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    for layer in range(len(cache.layers)):
        states = torch.randn(2, heads, count, size)
        cache.update(states, states, layer)
