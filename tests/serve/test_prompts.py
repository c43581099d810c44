"""A chat becomes tokens through the model's template, tools included."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.serve.errors import RequestRefused
from specmoe_compile.serve.prompts import chat_job, completion_job
from specmoe_compile.serve.requests import ChatRequest, CompletionRequest, parse

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }};{% endfor %}</tools>"
    "{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}{% endfor %}"
)
USER = {"role": "user", "content": "ADD"}


def _prompt(body: dict[str, Any], template: str = TEMPLATE) -> str:
    tokenizer = build_tokenizer(256)
    tokenizer.chat_template = template
    job = chat_job(parse(ChatRequest, body), tokenizer, 512)
    return str(tokenizer.decode(job.prompts[0]))


def test_tools_reach_the_template() -> None:
    assert _prompt({"messages": [USER], "tools": [TOOL]}) == "<tools>add;</tools>[user]ADD"
    assert _prompt({"messages": [USER], "tools": [TOOL], "tool_choice": "none"}) == "[user]ADD"


def test_a_call_and_its_result_are_turns() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    said = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    assert _prompt({"messages": said}) == "[user]ADD[assistant](add)[tool]2"


def test_text_parts_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    assert _prompt({"messages": [{"role": "developer", "content": parts}]}) == "[system]AB"
    with pytest.raises(RequestRefused, match="takes 'text' alone"):
        _prompt({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_a_template_that_raises_is_the_clients_mistake() -> None:
    with pytest.raises(RequestRefused, match="does not take these messages: no system turn") as no:
        _prompt({"messages": [USER]}, "{{ raise_exception('no system turn') }}")
    assert no.value.status == 400


def test_a_prompt_is_text_or_tokens_one_or_several() -> None:
    tokenizer = build_tokenizer(256)
    for prompt, count in (("AB", 1), ([1, 2], 1), (["A", "B"], 2), ([[1], [2]], 2)):
        body = parse(CompletionRequest, {"prompt": prompt, "n": 2})
        job = completion_job(body, tokenizer, 64)
        assert (len(job.prompts), job.choices, job.max_tokens) == (count, 2, 16)
    with pytest.raises(RequestRefused, match="--max-context"):
        completion_job(parse(CompletionRequest, {"prompt": "A" * 60}), tokenizer, 64)


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        (CompletionRequest, {"prompt": ["A", 1]}, "'prompt.1' is not valid: .* valid string"),
        (CompletionRequest, {"prompt": [[1], ["A"]]}, "'prompt.1.0' is not valid: .* integer"),
        (CompletionRequest, {"prompt": "A", "stop": [1]}, "'stop.0' is not valid: .* valid string"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [1]}]},
            "'messages.0.content.0' is",
        ),
        (ChatRequest, {"messages": [{}] * 200_000}, "'messages.0.role' is not valid"),
    ],
)
def test_a_refusal_names_the_place(kind: Any, body: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestRefused, match=told):
        parse(kind, body)


def test_what_is_nested_too_deeply_is_refused() -> None:
    """A parser may read what a writer cannot write."""
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(RequestRefused, match="nested too deeply"):
        parse(CompletionRequest, {"prompt": "A", "metadata": deep})
