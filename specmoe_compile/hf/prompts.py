"""A prompt runs as the model is, untraced, into a static cache or one that grows.

The backend gives Inductor no graph of more than 16 tokens (`compile_prefill=False`), so that all
that came of seconds of tracing was the same calls in the same order, and of two more lengths of
prompts two more traces. A graph of a shorter prompt would be compiled like a step's, and used once:
a prompt is what fills an empty cache, and under policy `exact` any runs as it is. It is traced
where the backend would do more than that before the prompt runs (refuse gradients, load a file of
default vectors).

Of a cache that grows Dynamo would learn from two lengths that the length changes, and compile a
step for each. So the first step after a prompt says it (`torch._dynamo.maybe_mark_dynamic`). Layers
that count in Python numbers, of a sliding window say, keep the traced prompt: what changes in them
cannot be said, and a prompt is cheaper to learn from than a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import eval_frame
from transformers.cache_utils import DynamicCache, DynamicLayer

from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS
from specmoe_compile.options import MAX_DECODE_TOKENS, CompileOptions, SessionOptions
from specmoe_compile.runtime.engine import with_prefetch_decided
from specmoe_compile.runtime.session import Session
from specmoe_compile.system.collector import old_objects_frozen
from specmoe_compile.system.free_cores import free_cores
from specmoe_compile.system.inductor import ask_compiler_ahead, start_compile_workers

Call = Callable[..., Any]

_TOKENS = ("input_ids", "inputs_embeds")
_OF_ANOTHER_PART = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs")


def prompts_as_they_are(
    compiled: Call, plain: Call, *, options: CompileOptions | None, session: Session
) -> Call:
    """Return `compiled` with prompts sent to `plain`, as above.

    Args:
        compiled: the model's forward call through `torch.compile`.
        plain: the same call without.
        options: those of the backend, None for another backend: nothing changes then.
        session: of the model's experts.
    """
    if options is None or not _runs_as_traced(options):
        return compiled
    told = says_length = False
    short_too = options.policy == "exact"

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal told, says_length
        if torch.is_grad_enabled() or not _is_prompt(args, kwargs, short_too):
            if says_length:
                # The first token is out, and this one is traced.
                ask_compiler_ahead() if session.device.type == "cpu" else start_compile_workers()
                says_length = False
                _mark_growing(kwargs)
                with old_objects_frozen():
                    return compiled(*args, **kwargs)
            return compiled(*args, **kwargs)
        says_length = True
        if not told:  # as the backend does it before the first step
            decided = with_prefetch_decided(options, [session.engine])
            session.configure(SessionOptions.view(decided))
            told = True
        if session.device.type != "cpu":
            return plain(*args, **kwargs)
        with free_cores.used():
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


def _is_prompt(args: tuple[Any, ...], kwargs: dict[str, Any], short_too: bool) -> bool:
    """Whether a call fills a cache with more than a step; no, where it cannot be seen."""
    if any(kwargs.get(name) is not None for name in _OF_ANOTHER_PART):
        return False
    caches = [kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None]
    if not any(getattr(c, "is_compileable", False) or _only_grows(c) for c in caches):
        return False
    given = [kwargs.get(name) for name in _TOKENS] + list(args[:1])
    shapes = [each.shape for each in given if isinstance(each, torch.Tensor) and each.dim() >= 2]
    if any(shape[0] * shape[1] > MAX_DECODE_TOKENS for shape in shapes):
        return True
    return short_too and any(shape[1] > 1 for shape in shapes) and all(map(_is_empty, caches))


def _is_empty(cache: Any) -> bool:
    """Whether a cache holds no token; one on a GPU that was used before is waited for."""
    layers = getattr(cache, "layers", None)
    if layers is not None and not any(getattr(layer, "is_initialized", True) for layer in layers):
        return True
    return int(cache.get_seq_length()) == 0


def _only_grows(cache: Any) -> bool:
    """Whether nothing but the length of a cache's tensors changes from step to step."""
    if type(cache) is not DynamicCache:
        return False
    if not cache.layers:
        return getattr(cache, "layer_class_to_replicate", None) is DynamicLayer
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _mark_growing(kwargs: dict[str, Any]) -> None:
    """Tell Dynamo which sizes of a step's arguments another step changes."""
    mask = kwargs.get("attention_mask")
    for cache in (kwargs.get(name) for name in CACHE_ARGUMENTS):
        if cache is None or not _only_grows(cache):
            continue
        for layer in cache.layers:
            for tensor in (getattr(layer, name, None) for name in ("keys", "values")):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                    torch._dynamo.maybe_mark_dynamic(tensor, 2)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            torch._dynamo.maybe_mark_dynamic(mask, 1)
