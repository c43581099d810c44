"""`specmoe serve` answers the real client with the unmodified model's tokens."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import (
    LONG_TOKENS,
    MAX_CONTEXT,
    NAME,
    PATIENCE_S,
    Process,
    begin_long,
    connect,
)

openai = pytest.importorskip("openai")
MESSAGES = [{"role": "user", "content": "HELLO"}]


def test_completions_are_the_models_own(client: Any, expected: Any) -> None:
    whole = client.completions.create(model=NAME, prompt="1 + 1 =", max_tokens=12, temperature=0)
    assert whole.choices[0].text == expected("1 + 1 =", 12)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 12)
    stream = client.completions.create(
        model=NAME,
        prompt="1 + 1 =",
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_a_chat_is_the_template_and_the_models_own(client: Any, expected: Any) -> None:
    whole = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_completion_tokens=10, temperature=0
    )
    text = expected("[user]HELLO\n[assistant]", 10)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_completion_tokens=10, temperature=0, stream=True
    )
    deltas = [chunk.choices[0] for chunk in stream]
    assert "".join(delta.delta.content or "" for delta in deltas) == text
    assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == "length"


def test_the_next_turn_reads_its_end_only(client: Any, expected: Any) -> None:
    prompt = "A LONG BEGINNING THAT BOTH TURNS SHARE, WORD BY WORD."
    first = client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0)
    longer = prompt + " AND AN END."
    second = client.completions.create(model=NAME, prompt=longer, max_tokens=8, temperature=0)
    assert second.choices[0].text == expected(longer, 8)
    assert second.usage.prompt_tokens_details.cached_tokens == len(prompt)
    again = client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0)
    assert again.choices[0].text == first.choices[0].text
    assert again.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1


def test_a_seed_repeats_a_sample_and_n_gives_several(client: Any) -> None:
    def draw(seed: int, n: int = 1) -> list[str]:
        out = client.completions.create(
            model=NAME, prompt="ONCE", max_tokens=8, temperature=1.5, seed=seed, n=n
        )
        return [choice.text for choice in out.choices]

    assert draw(1) == draw(1) != draw(2)
    several = draw(1, n=3)
    assert several[0] == draw(1)[0] and len(set(several)) == 3


def test_a_stop_string_ends_the_text_and_is_not_in_it(client: Any, expected: Any) -> None:
    text = expected("STOP", 24)
    stop = text[6:8]
    for stream in (False, True):
        out = client.completions.create(
            model=NAME, prompt="STOP", max_tokens=24, temperature=0, stop=stop, stream=stream
        )
        choices = [c.choices[0] for c in out] if stream else [out.choices[0]]
        assert "".join(c.text for c in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


BAD = {
    "no prompt": {},
    "a prompt of nothing": {"prompt": ""},
    "tokens out of range": {"prompt": [1, 100000]},
    "no tokens asked": {"prompt": "A", "max_tokens": 0},
    "more than the context": {"prompt": "A", "max_tokens": MAX_CONTEXT},
    "a hot temperature": {"prompt": "A", "temperature": 3},
    "a word for a number": {"prompt": "A", "max_tokens": "ten"},
    "not a number": {"prompt": "A", "temperature": float("nan")},
    "many choices": {"prompt": "A", "n": 9},
    "an empty stop": {"prompt": "A", "stop": ""},
    "log probabilities": {"prompt": "A", "logprobs": 2},
    "an unknown field": {"prompt": "A", "beam_width": 4},
    "a penalty": {"prompt": "A", "presence_penalty": 0.5},
    "half of a surrogate pair": {"prompt": "\ud800"},
    "no object": [1, 2],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_refused_in_openais_form(server: Process, name: str) -> None:
    content = json.dumps(BAD[name])
    headers = {"content-type": "application/json"}
    out = _http("POST", f"{server.url}/v1/completions", content=content, headers=headers)
    assert out.status_code == 400, out.text
    error = out.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"].endswith(".")


def test_a_template_argument_of_the_servers_own_is_refused(client: Any) -> None:
    for name, value in (("tokenize", False), ("messages", []), ("tools", [])):
        with pytest.raises(openai.BadRequestError, match=f"sets {name}, which the server sets"):
            client.chat.completions.create(
                model=NAME, messages=MESSAGES, extra_body={"chat_template_kwargs": {name: value}}
            )


def test_a_temperature_near_zero_is_greedy(client: Any, expected: Any) -> None:
    out = client.completions.create(model=NAME, prompt="COLD", max_tokens=8, temperature=1e-300)
    assert out.choices[0].text == expected("COLD", 8)


def test_other_refusals(server: Process, client: Any) -> None:
    url = f"{server.url}/v1/completions"
    kind = {"content-type": "application/json"}
    assert _http("POST", url, content=b"{", headers=kind).status_code == 400
    assert _http("POST", url, content=b"[" * 100_000, headers=kind).status_code == 400
    assert (
        _http("POST", url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    )
    assert _http("POST", url, content=b" " * (9 << 20), headers=kind).status_code == 413
    chunks = (b" " * (1 << 20) for _ in range(9))  # a length that nobody announced
    assert _http("POST", url, content=chunks, headers=kind).status_code == 413
    assert _http("GET", url, headers={"host": "evil.example"}).status_code == 403
    assert _http("GET", f"{server.url}/nowhere").status_code == 404
    assert _http("GET", url).headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="gpt-7", prompt="A")
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model=NAME, messages=MESSAGES, tools=[tool])
    assert [model.id for model in client.models.list()] == [NAME]


def test_a_client_that_goes_away_ends_its_generation(server: Process, client: Any) -> None:
    before = _metric(server, "specmoe_completion_tokens_total")
    begin_long(client).close()
    client.completions.create(model=NAME, prompt="NEXT", max_tokens=1)
    assert 2 <= _metric(server, "specmoe_completion_tokens_total") - before < LONG_TOKENS // 2


def test_requests_from_many_threads_get_their_own_answers(client: Any, expected: Any) -> None:
    prompts = [f"REQUEST {number}" for number in range(8)]

    def ask(prompt: str) -> str:
        out = client.completions.create(model=NAME, prompt=prompt, max_tokens=4, temperature=0)
        return str(out.choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, prompts * 6 + prompts[:2]))
    assert len(texts) == 50
    want = {prompt: expected(prompt, 4) for prompt in prompts}
    assert texts == [want[prompt] for prompt in prompts * 6 + prompts[:2]]


def test_health_and_metrics(server: Process, client: Any) -> None:
    client.completions.create(model=NAME, prompt="COUNT", max_tokens=4)
    assert _http("GET", f"{server.url}/health").json()["status"] == "ok"
    assert _metric(server, "specmoe_completion_tokens_total") >= 4
    assert 0.0 < _metric(server, "specmoe_expert_hit_rate") <= 1.0
    assert _metric(server, "specmoe_expert_missed_bytes") > 0
    assert _metric(server, "specmoe_queue_length") == 0
    assert _metric(server, "specmoe_prompt_tokens_total") >= 5
    for name in ("specmoe_time_per_token_seconds", "specmoe_time_to_first_token_seconds"):
        assert _metric(server, f"{name}_count") > 0 < _metric(server, f"{name}_sum")
    labels = '{endpoint="/v1/completions",status="200"}'
    assert _metric(server, f"specmoe_requests_total{labels}") >= 1


def _http(method: str, url: str, **given: Any) -> httpx.Response:
    return httpx.request(method, url, timeout=PATIENCE_S, **given)


def _metric(server: Process, name: str) -> float:
    text = _http("GET", f"{server.url}/metrics").text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(name + " ")))


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_again(checkpoint: Path, tmp_path: Path) -> None:
    server = Process(checkpoint, tmp_path / "store", "--max-queue", "1", "--api-key", "secret")
    client, wrong = connect(server, "secret"), connect(server, "guess")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    assert _http("GET", f"{server.url}/health").status_code == 200

    running = begin_long(client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model=NAME, prompt="A", max_tokens=1)
        while _http("GET", f"{server.url}/health").json()["queue"] < 1:
            assert not waiting.done(), waiting
        with pytest.raises(openai.RateLimitError, match="1 requests wait already") as refused:
            client.completions.create(model=NAME, prompt="B", max_tokens=1)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        running.close()
        assert waiting.result().usage.completion_tokens == 1

    # A stop in the middle of a generation is clean, for what runs and for what waits.
    running = begin_long(client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model=NAME, prompt="A", max_tokens=1)
        while _http("GET", f"{server.url}/health").json()["queue"] < 1:
            assert not waiting.done(), waiting
        assert server.end() == 0, server.log()
        for left in (lambda: list(running), waiting.result):
            with pytest.raises(openai.APIError, match="shutting down"):
                left()
    assert "Traceback" not in server.log(), server.log()


@pytest.mark.slow
def test_memory_does_not_grow(server: Process, client: Any) -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(server.process.pid)

    def ask(count: int) -> int:
        for number in range(count):
            client.completions.create(model=NAME, prompt=f"M{number}", max_tokens=2)
        return int(process.memory_info().rss)

    ask(50)
    before = process.memory_info().rss
    assert ask(500) - before < 32 << 20
    assert process.num_threads() < 40
