"""Answers in OpenAI's form: whole, or chunk by chunk."""

from __future__ import annotations

import abc
import json
import logging
import time
import uuid
from typing import Any

from specmoe_compile.serve.engine import Event, Finished, Piece

logger = logging.getLogger(__name__)

_ANY_TEXT = "\0"


def server_sent(data: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


class Answer(abc.ABC):
    """Texts, finish reasons and token counts of one request's choices."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, *, choices: int) -> None:
        """Begin an answer.

        Args:
            model: its name.
            choices: answers to each prompt, which is counted once for all of them.
        """
        self._identity = self.prefix + uuid.uuid4().hex
        self._model = model
        self._choices = choices
        self._created = int(time.time())
        self._texts: dict[int, list[str]] = {}
        self._finished: dict[int, Finished] = {}
        self._around_text: dict[int, tuple[bytes, bytes]] = {}

    def take(self, event: Event) -> None:
        """Note an event."""
        if isinstance(event, Piece):
            self._texts.setdefault(event.choice, []).append(event.text)
        elif isinstance(event, Finished):
            self._finished[event.choice] = event

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = [
            {"index": index, "logprobs": None, **self._choice(finished)}
            for index, finished in sorted(self._finished.items())
        ]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    def said(self, event: Piece | Finished) -> bytes:
        """Note an event; returns what a stream says of it: no, one or several chunks.

        The chunks of a choice's texts differ in the text alone: what is around it is made once.
        """
        self.take(event)
        choice = event.choice
        if isinstance(event, Piece) and choice in self._around_text:
            before, after = self._around_text[choice]
            return before + json.dumps(event.text).encode() + after
        part = self._text_part(_ANY_TEXT)
        if isinstance(event, Piece) and part is not None:
            before, _, after = self._chunk(choice, part).rpartition(json.dumps(_ANY_TEXT).encode())
            self._around_text[choice] = (before, after)
        return b"".join(self._chunk(choice, each) for each in self._parts(event))

    def said_usage(self) -> bytes:
        """The last chunk of a stream whose client asked for `include_usage`."""
        return server_sent({**self._head(self.chunk_kind), "choices": [], "usage": self._usage()})

    @abc.abstractmethod
    def _choice(self, finished: Finished) -> dict[str, Any]:
        """One whole choice."""

    @abc.abstractmethod
    def _text_part(self, text: str) -> dict[str, Any] | None:
        """A streamed choice that says a text; None where texts wait for the end."""

    @abc.abstractmethod
    def _parts(self, event: Piece | Finished) -> list[dict[str, Any]]:
        """The streamed choices that say one event."""

    def _chunk(self, choice: int, part: dict[str, Any]) -> bytes:
        choices = [{"index": choice, "logprobs": None, **part}]
        return server_sent({**self._head(self.chunk_kind), "choices": choices})

    def _text(self, choice: int) -> str:
        return "".join(self._texts.get(choice, ()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._identity,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def _usage(self) -> dict[str, Any]:
        done = self._finished.values()
        prompt = sum(f.prompt_tokens for f in done) // self._choices
        completion = sum(f.completion_tokens for f in done)
        cached = sum(f.cached_tokens for i, f in self._finished.items() if not i % self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class CompletionAnswer(Answer):
    """Of `/v1/completions`."""

    prefix = "cmpl-"
    kind = chunk_kind = "text_completion"

    def _choice(self, finished: Finished) -> dict[str, Any]:
        return {"text": self._text(finished.choice), "finish_reason": finished.reason}

    def _text_part(self, text: str) -> dict[str, Any]:
        return {"text": text, "finish_reason": None}

    def _parts(self, event: Piece | Finished) -> list[dict[str, Any]]:
        if isinstance(event, Piece):
            return [self._text_part(event.text)]
        return [{"text": "", "finish_reason": event.reason}]


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        *,
        choices: int,
        tokenizer: Any,
        prompt: list[int],
        tools: list[dict[str, Any]] | None,
    ) -> None:
        """Begin an answer.

        Args:
            model: its name.
            choices: answers to the prompt.
            tokenizer: may know how the model writes a call of a tool (`response_template`).
            prompt: token ids.
            tools: what the client offers. With a tokenizer that knows, a stream says the text at
                its end, since what begins like text may be a call.
        """
        super().__init__(model, choices=choices)
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._tools = tools
        self._parses = bool(tools) and getattr(tokenizer, "response_template", None) is not None
        self._opened: set[int] = set()

    def _choice(self, finished: Finished) -> dict[str, Any]:
        message, reason = self._message(finished)
        return {"message": {"role": "assistant", **message}, "finish_reason": reason}

    def _text_part(self, text: str) -> dict[str, Any] | None:
        return None if self._parses else _delta({"content": text})

    def _parts(self, event: Piece | Finished) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        if event.choice not in self._opened:
            self._opened.add(event.choice)
            said.append(_delta({"role": "assistant", "content": ""}))
        if isinstance(event, Piece):
            part = self._text_part(event.text)
            return said if part is None else [*said, part]
        reason = event.reason
        if self._parses:
            message, reason = self._message(event)
            calls = message.get("tool_calls") or []
            delta = {k: v for k, v in message.items() if k != "tool_calls" and v}
            if calls:
                delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
            if delta:
                said.append(_delta(delta))
        return [*said, _delta({}, reason)]

    def _message(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """The message without its role, and the finish reason."""
        text = self._text(finished.choice)
        if not self._parses or finished.reason != "stop":
            return {"content": text}, finished.reason
        try:
            parsed = self._tokenizer.parse_response(
                list(finished.tokens), prefix=self._prompt, tools=self._tools
            )
        except Exception as error:  # a model may write a call that its own parser refuses
            logger.warning("An answer could not be parsed, it is given as text: %s", error)
            return {"content": text}, finished.reason
        calls = [_tool_call(call) for call in parsed.get("tool_calls") or ()]
        message: dict[str, Any] = {"content": parsed.get("content") or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        return message, "tool_calls" if calls else finished.reason


def _delta(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"delta": delta, "finish_reason": reason}


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {
            "name": function.get("name", ""),
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
        },
    }
