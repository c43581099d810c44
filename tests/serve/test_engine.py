"""The loop that owns the model, with a stand-in for it: tokens come when the test says so."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.serve.engine import Engine, Failed, Finished, Job, Piece
from specmoe_compile.serve.errors import RequestRefused
from tests.helpers import tiny_qwen3_moe
from tests.serve.conftest import PATIENCE_S


class Model:
    """Generates "A" for ever; counts what it was asked for."""

    def __init__(self) -> None:
        self.config = tiny_qwen3_moe().config
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.device = torch.device("cpu")
        self.steps = 0
        self.go = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)

    def forward(self, past_key_values: Any = None) -> None:
        """For its signature."""

    def generate(self, ids: Any, *, streamer: Any, max_new_tokens: int, **others: Any) -> None:
        streamer.put(ids)
        for _ in range(max_new_tokens):
            self.asked.release()
            assert self.go.acquire(timeout=PATIENCE_S)
            self.steps += 1
            streamer.put(torch.tensor([65]))


def _job(tokens: int) -> tuple[Job, list[Any], threading.Event]:
    events: list[Any] = []
    ended = threading.Event()

    def note(event: Any) -> None:
        events.append(event)
        if event is None:
            ended.set()

    return Job([[1, 2, 3]], 1, tokens, {}, (), 0, note), events, ended


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def engine(model: Model) -> Any:
    made = Engine(model, build_tokenizer(256), max_context=64, max_queue=1)
    yield made
    made.stop()
    model.go.release(1000)
    assert made.join(PATIENCE_S)


def test_a_cancelled_job_computes_at_most_the_token_that_is_under_way(
    engine: Engine, model: Model
) -> None:
    job, events, ended = _job(50)
    engine.submit(job)
    for _ in range(3):
        assert model.asked.acquire(timeout=PATIENCE_S)
        model.go.release()
    assert model.asked.acquire(timeout=PATIENCE_S)  # the fourth is under way
    engine.cancel(job)
    model.go.release(1000)
    assert ended.wait(PATIENCE_S)
    assert model.steps == 4
    assert not any(isinstance(event, Finished) for event in events)


def test_a_cancelled_job_leaves_the_queue_at_once(engine: Engine, model: Model) -> None:
    running, _, ended = _job(2)
    waiting, events, _ = _job(2)
    engine.submit(running)
    assert model.asked.acquire(timeout=PATIENCE_S)
    engine.submit(waiting)
    with pytest.raises(RequestRefused) as refused:
        engine.submit(_job(2)[0])
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
    engine.cancel(waiting)
    assert events == [None] and engine.queue_length == 0
    model.go.release(1000)
    assert ended.wait(PATIENCE_S)
    assert model.steps == 2


def test_a_generation_that_fails_leaves_the_engine_alive(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    model.go.release(1000)
    job, events, ended = _job(2)
    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", fail, raising=False)
        engine.submit(job)
        assert ended.wait(PATIENCE_S)
    assert isinstance(events[0], Failed)
    job, events, ended = _job(2)
    engine.submit(job)
    assert ended.wait(PATIENCE_S)
    assert next(e for e in events if isinstance(e, Finished)).completion_tokens == 2


@pytest.mark.parametrize(
    ("every_s", "stops", "texts"),
    [
        (0.0, (), ["A"] * 6),
        (3600.0, (), ["A", "AAAAA"]),
        (math.inf, (), ["AAAAAA"]),
        (3600.0, ("B",), ["A", "AAAAA"]),
        (math.inf, ("AAAA",), []),
    ],
    ids=["each", "the first and the rest", "all", "a stop that never comes", "a stop at once"],
)
def test_text_is_shown_no_more_often_than_asked(
    engine: Engine, model: Model, every_s: float, stops: tuple[str, ...], texts: list[str]
) -> None:
    model.go.release(1000)
    job, events, ended = _job(6)
    job.text_every_s, job.stops = every_s, stops
    engine.submit(job)
    assert ended.wait(PATIENCE_S)
    assert [event.text for event in events if isinstance(event, Piece)] == texts
    finished = next(event for event in events if isinstance(event, Finished))
    if stops == ("AAAA",):
        assert (finished.reason, finished.completion_tokens, model.steps) == ("stop", 4, 4)
    else:
        assert (finished.reason, finished.completion_tokens) == ("length", 6)


@pytest.mark.parametrize(("end", "reason"), [([65], "stop"), (66, "length")])
def test_the_models_end_token_is_a_stop(model: Model, end: Any, reason: str) -> None:
    model.generation_config.eos_token_id = end
    model.go.release(1000)
    engine = Engine(model, build_tokenizer(256), max_context=64, max_queue=1)
    job, events, ended = _job(1)
    engine.submit(job)
    assert ended.wait(PATIENCE_S)
    assert next(e for e in events if isinstance(e, Finished)).reason == reason
    engine.stop()
    assert engine.join(PATIENCE_S)


@pytest.mark.parametrize(
    ("every_s", "stops", "decoded"), [(3600.0, (), 3), (math.inf, (), 2), (3600.0, ("B",), 22)]
)
def test_a_token_whose_text_is_not_due_is_not_decoded(
    model: Model, every_s: float, stops: tuple[str, ...], decoded: int
) -> None:
    """Decoding waits for what a streamer does; a stop string alone needs every token's text."""
    model.go.release(1000)
    calls: list[int] = []

    class Counting:
        pad_token_id = 0

        def decode(self, tokens: Any, **settings: Any) -> str:
            calls.append(len(tokens))
            return "A" * len(tokens)

    engine = Engine(model, Counting(), max_context=64, max_queue=1)
    job, events, ended = _job(20)
    job.text_every_s, job.stops = every_s, stops
    engine.submit(job)
    assert ended.wait(PATIENCE_S)
    engine.stop()
    assert engine.join(PATIENCE_S)
    assert "".join(event.text for event in events if isinstance(event, Piece)) == "A" * 20
    assert len(calls) == decoded  # two of them in `finish`, for what is left
