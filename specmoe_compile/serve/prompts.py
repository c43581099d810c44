"""Requests to jobs: tokens of prompts, limits on their number, the chat template."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase

from specmoe_compile.serve.engine import Event, Job
from specmoe_compile.serve.errors import RequestRefused
from specmoe_compile.serve.requests import ChatRequest, CompletionRequest

_COMPLETION_TOKENS = 16  # what OpenAI's endpoint gives where nobody says how many
_MAX_PROMPTS = 16
_OWN_TEMPLATE_ARGUMENTS = (
    frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    - {"kwargs"}
) | {"messages"}
"""Arguments of transformers' own; all others reach the template."""


def completion_job(request: CompletionRequest, tokenizer: Any, max_context: int) -> Job:
    """The job of `/v1/completions`; raises `RequestRefused`."""
    prompt = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompts: list[Any] = [prompt]
    else:
        prompts = list(prompt)
    if not 0 < len(prompts) <= _MAX_PROMPTS:
        raise RequestRefused(
            400, f"'prompt' holds {len(prompts)} prompts: give 1 to {_MAX_PROMPTS}.", param="prompt"
        )
    ids = [_tokens(tokenizer, p) if isinstance(p, str) else _checked(tokenizer, p) for p in prompts]
    most = request.max_tokens if request.max_tokens is not None else _COMPLETION_TOKENS
    return _job(request, ids, _fitting(ids, most, max_context, "prompt"))


def chat_job(request: ChatRequest, tokenizer: Any, max_context: int) -> Job:
    """The job of `/v1/chat/completions`; raises `RequestRefused`."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestRefused(
            400, "This model has no chat template: use /v1/completions.", param="messages"
        )
    settings = dict(request.chat_template_kwargs or {})
    if taken := sorted(settings.keys() & _OWN_TEMPLATE_ARGUMENTS):
        raise RequestRefused(
            400,
            f"'chat_template_kwargs' sets {', '.join(taken)}, which the server sets itself: leave"
            " it out.",
            param="chat_template_kwargs",
        )
    if request.reasoning_effort is not None:
        settings["reasoning_effort"] = request.reasoning_effort
    wants_tools = request.tools and (request.model_extra or {}).get("tool_choice") != "none"
    if wants_tools and "tools" not in str(tokenizer.chat_template):
        raise RequestRefused(
            400, "This model's chat template has no place for tools.", param="tools"
        )
    try:
        out = tokenizer.apply_chat_template(
            [message.as_template_input() for message in request.messages],
            tools=request.tools if wants_tools else None,
            add_generation_prompt=True,
            return_dict=True,
            **settings,
        )
    except RequestRefused:
        raise
    except Exception as error:  # a template is a program of the model's, and may raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise RequestRefused(
            400, f"The model's chat template does not take these messages: {text}", param="messages"
        ) from error
    ids = [[int(token) for token in out["input_ids"]]]
    most = request.max_completion_tokens or request.max_tokens
    if most is None:
        most = max(1, max_context - len(ids[0]))
    return _job(request, ids, _fitting(ids, most, max_context, "messages"))


def _job(request: Any, prompts: list[list[int]], max_tokens: int) -> Job:
    def nobody(event: Event) -> None:
        """Whoever submits the job says where its events go."""

    return Job(
        prompts=prompts,
        choices=request.n or 1,
        max_tokens=max_tokens,
        sampling=request.sampling(),
        stops=request.stops(),
        seed=request.seed,
        on_event=nobody,
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text).input_ids]


def _checked(tokenizer: Any, ids: list[int]) -> list[int]:
    size = len(tokenizer)
    if any(not 0 <= token < size for token in ids):
        raise RequestRefused(
            400, f"'prompt' holds token ids outside of 0 to {size - 1}.", param="prompt"
        )
    return ids


def _fitting(prompts: list[list[int]], max_tokens: int, max_context: int, param: str) -> int:
    longest = max(len(ids) for ids in prompts)
    if any(not ids for ids in prompts):
        raise RequestRefused(400, f"'{param}' has no tokens.", param=param)
    if longest + max_tokens > max_context:
        raise RequestRefused(
            400,
            f"The prompt has {longest} tokens and {max_tokens} may follow, more than this server's"
            f" context of {max_context}: shorten it, ask for fewer tokens, or start the server with"
            " a larger --max-context.",
            param=param,
            code="context_length_exceeded",
        )
    return max_tokens
