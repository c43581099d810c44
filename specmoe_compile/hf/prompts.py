"""A prompt into a static cache runs as the model is, untraced.

The backend gives Inductor no graph of more than 16 tokens (`compile_prefill=False`), so that all
that came of seconds of tracing was the same calls in the same order, and of two more lengths of
prompts two more traces. It is traced where the backend would do more than that before the prompt
runs (refuse gradients, load a file of default vectors), and with a cache that grows: Dynamo learns
from two lengths that the length changes, and a prompt is the cheaper one to learn from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import eval_frame

from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS
from specmoe_compile.options import MAX_DECODE_TOKENS, CompileOptions, SessionOptions
from specmoe_compile.runtime.engine import with_prefetch_decided
from specmoe_compile.runtime.session import Session

Call = Callable[..., Any]

_TOKENS = ("input_ids", "inputs_embeds")
_OF_ANOTHER_PART = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs")


def prompts_as_they_are(
    compiled: Call, plain: Call, *, options: CompileOptions | None, session: Session
) -> Call:
    """Return `compiled` with prompts of more than 16 tokens into a static cache sent to `plain`.

    Args:
        compiled: the model's forward call through `torch.compile`.
        plain: the same call without.
        options: those of the backend, None for another backend: nothing changes then.
        session: of the model's experts.
    """
    if options is None or not _runs_as_traced(options):
        return compiled
    told = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal told
        if torch.is_grad_enabled() or not _is_prompt(args, kwargs):
            return compiled(*args, **kwargs)
        if not told:  # as the backend does it before the first step
            decided = with_prefetch_decided(options, [session.engine])
            session.configure(SessionOptions.view(decided))
            told = True
        return plain(*args, **kwargs)

    return call


def options_or_none(context: Any) -> CompileOptions | None:
    """Return the options of a wrapper of `torch.compile`, if its backend is specmoe's.

    Args:
        context: the wrapper's `dynamo_ctx`.

    Raises:
        ValueError: an unknown option, or a value that is not valid.
    """
    backend = eval_frame.innermost_backend(context.callback)
    return options_of(getattr(backend, "compiler_name", None), getattr(backend, "kwargs", {}))


def options_of(backend: Any, arguments: dict[str, Any]) -> CompileOptions | None:
    """Return the options among the arguments of `torch.compile`, if `backend` is specmoe's."""
    if backend != "specmoe":
        return None
    return CompileOptions.from_kwargs(arguments.get("options"), arguments.get("mode"))


def _runs_as_traced(options: CompileOptions) -> bool:
    return (
        options.lowering == "inductor"
        and not options.compile_prefill
        and options.default_vectors is None
    )


def _is_prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call fills a static cache with more than a step; no, where it cannot be seen."""
    if any(kwargs.get(name) is not None for name in _OF_ANOTHER_PART):
        return False
    if not any(getattr(kwargs.get(name), "is_compileable", False) for name in CACHE_ARGUMENTS):
        return False
    given = [kwargs.get(name) for name in _TOKENS] + list(args[:1])
    return any(
        isinstance(tokens, torch.Tensor)
        and tokens.dim() >= 2
        and tokens.shape[0] * tokens.shape[1] > MAX_DECODE_TOKENS
        for tokens in given
    )
