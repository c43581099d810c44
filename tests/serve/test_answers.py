"""Calls of tools: told as calls where the tokenizer can read them, as text where it cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.serve.answers import ChatAnswer, CompletionAnswer
from specmoe_compile.serve.engine import Finished, Piece

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
READABLE = {
    "start_anchor": "[assistant]",
    "fields": {
        "content": {"content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


def answer(text: str, *, template: Any, tools: Any, reason: str = "stop") -> tuple[Any, list[Any]]:
    """The whole answer and the chunks of a stream for what a model said."""
    tokenizer = build_tokenizer(256)
    tokenizer.response_template = template
    prompt = tokenizer("[user]ADD[assistant]").input_ids
    tokens = tuple(tokenizer(text).input_ids)
    events = [Piece(0, text[:5]), Piece(0, text[5:])]
    last = Finished(0, reason, prompt_tokens=len(prompt), cached_tokens=0, tokens=tokens)
    made = [
        ChatAnswer("m", choices=1, tokenizer=tokenizer, prompt=prompt, tools=tools) for _ in "ab"
    ]
    for event in (*events, last):
        made[0].take(event)
    said = b"".join(made[1].said(event) for event in (*events, last))
    chunks = [json.loads(line.removeprefix("data: ")) for line in said.decode().split("\n\n")[:-1]]
    return made[0].whole()["choices"][0], [chunk["choices"][0] for chunk in chunks]


def test_a_call_is_told_as_a_call() -> None:
    whole, chunks = answer("I ADD." + CALL, template=READABLE, tools=[TOOL])
    assert whole["finish_reason"] == "tool_calls" == chunks[-1]["finish_reason"]
    assert whole["message"]["content"] == "I ADD."
    for calls in (whole["message"]["tool_calls"], chunks[-2]["delta"]["tool_calls"]):
        assert calls[0]["function"]["name"] == "add"
        assert json.loads(calls[0]["function"]["arguments"]) == {"x": 1}
    assert "".join(c["delta"].get("content", "") for c in chunks) == "I ADD."


@pytest.mark.parametrize(
    ("text", "template", "tools", "reason"),
    [
        (CALL, None, [TOOL], "stop"),
        (CALL, READABLE, None, "stop"),
        ("<tool_call>{not json}</tool_call>", READABLE, [TOOL], "stop"),
        (CALL[:20], READABLE, [TOOL], "length"),
    ],
    ids=["no parser", "no tools", "a call that cannot be read", "cut off"],
)
def test_else_it_is_text(text: str, template: Any, tools: Any, reason: str) -> None:
    whole, chunks = answer(text, template=template, tools=tools, reason=reason)
    assert whole["message"] == {"role": "assistant", "content": text}
    assert "".join(c["delta"].get("content", "") for c in chunks) == text
    assert whole["finish_reason"] == reason == chunks[-1]["finish_reason"]


TEXTS = ["A", "", '"', "\\u0000 \0", "\n\ndata: x", "\ud7ff é 😀", '{"text": "\\u0000"}']


@pytest.mark.parametrize("name", ["m", '\0"text": "\0"'])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_text_of_a_stream_has_the_form_of_the_first(kind: str, name: str) -> None:
    """What is around a text is made once."""
    tokenizer = build_tokenizer(256)
    made: Any = (
        CompletionAnswer(name, choices=2)
        if kind == "completion"
        else ChatAnswer(name, choices=2, tokenizer=tokenizer, prompt=[1], tools=None)
    )
    chunks: dict[int, list[Any]] = {0: [], 1: []}
    for text in TEXTS:
        for choice in chunks:
            events = made.said(Piece(choice, text)).decode().split("\n\n")
            assert events.pop() == ""
            chunks[choice].append(json.loads(events[-1].removeprefix("data: ")))
    for choice, texts in chunks.items():
        shown = [
            chunk["choices"][0].pop("text" if kind == "completion" else "delta") for chunk in texts
        ]
        assert shown == [text if kind == "completion" else {"content": text} for text in TEXTS]
        assert all(chunk == texts[0] for chunk in texts)
        assert texts[0]["model"] == name and texts[0]["choices"][0]["index"] == choice
