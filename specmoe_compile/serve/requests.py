"""The requests that the server takes, and how they become a `Job`.

A field that would change the answer and is not supported is refused, never dropped; one that a
client sends by habit and that changes nothing is accepted.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specmoe_compile.serve.errors import RequestRefused

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
_COLDEST = 1e-3
"""Below it a temperature means the best token: scores divided by less leave the range of floats."""

_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""Fields that tell a hosted service something and say nothing about the text."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
}
"""Fields that are not supported, and the values at which they ask for nothing."""


T = TypeVar("T")
_List = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first wrong item ends the check: a body has room for millions of them."""


class StreamOptions(BaseModel):
    """`stream_options` of a streamed request."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    """What both endpoints take; numbers as OpenAI bounds them."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=10.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | _List[str] | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings; raises `RequestRefused` where there are too many or one is empty."""
        given = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(given) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARACTERS for s in given):
            raise RequestRefused(
                400,
                f"'stop' takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS}"
                " characters.",
                param="stop",
            )
        return tuple(given)

    def check_extra(self) -> None:
        """Refuse what is not supported, by name."""
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS or value is None:
                continue
            if name not in _NEUTRAL:
                raise RequestRefused(
                    400, f"'{name}' is not a field that this server knows.", param=name
                )
            if value not in _NEUTRAL[name]:
                raise RequestRefused(
                    400,
                    f"'{name}' is not supported by this server: leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )

    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate`; what is not given is the model's own generation config."""
        given: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if given.get("temperature", 1.0) < _COLDEST:
            # Greedy: what shapes a distribution would be warned of, and changes nothing.
            return {
                "do_sample": False,
                **{k: v for k, v in given.items() if k == "repetition_penalty"},
            }
        if given.keys() - {"repetition_penalty"}:
            given["do_sample"] = True
        return given


class CompletionRequest(_Request):
    """Body of `/v1/completions`."""

    prompt: str | _List[str] | _List[int] | _List[_List[int]]


class Message(BaseModel):
    """One turn of a conversation; content as text, or as a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | _List[dict[str, Any]] | None = None

    def as_template_input(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        turn = dict(self.model_extra or {}, role=self.role)
        turn["role"] = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise RequestRefused(
                        400,
                        f"A message's content part has type {part.get('type')!r}: this server"
                        " takes 'text' alone.",
                        param="messages",
                    )
            turn["content"] = "".join(part["text"] for part in self.content)
        else:
            turn["content"] = self.content or ""
        return turn


class ChatRequest(_Request):
    """Body of `/v1/chat/completions`."""

    messages: _List[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: _List[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    """Handed to the chat template, which may have a use for it (GPT-OSS has)."""


R = TypeVar("R", bound=_Request)


def _is_kind(part: str | int) -> bool:
    """Whether a part of an error's place is a type that a field may have, and not a key."""
    return part == "str" or (isinstance(part, str) and part.startswith("list["))


def parse(kind: type[R], body: Any) -> R:
    """Validate one body; raises `RequestRefused` with a sentence that names the field."""
    if not isinstance(body, dict):
        raise RequestRefused(400, "The body is not a JSON object.")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise RequestRefused(
            400, "The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no text."
        ) from error
    except RecursionError as error:  # it could be read, which takes less depth than writing it
        raise RequestRefused(400, "The body is nested too deeply.") from error
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        # Of a field that may be several things, what it is most like tells most.
        told = max(error.errors(include_input=False), key=lambda one: len(one["loc"]))
        where = [str(part) for part in told["loc"] if not _is_kind(part)]
        raise RequestRefused(
            400,
            f"'{'.'.join(where)}' is not valid: {told['msg']}.",
            param=where[0] if where else None,
        ) from error
    request.check_extra()
    return request
