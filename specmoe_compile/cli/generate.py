"""`specmoe generate`: stream text from a model whose experts are offloaded."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specmoe_compile.bench.cuda_graphs import fetched_from, with_cuda_graphs
from specmoe_compile.cli.options import (
    ADAPTER,
    COMPILE_OPTION,
    DEBUG,
    DEVICE,
    DTYPE,
    EXPERT_CACHE,
    JSON,
    KV_CACHE,
    MISSING_WEIGHTS,
    MODEL,
    QUANTIZE,
    STORE,
    STORE_DIR,
    THREADS,
    compile_options,
    require_compiler,
)
from specmoe_compile.cli.ranks import first_ranks, refuse_on_ranks
from specmoe_compile.cli.tokenizer import quiet_tokenizer
from specmoe_compile.system.launched import split_of_ranks
from specmoe_compile.system.progress import phase

if TYPE_CHECKING:
    from specmoe_compile.replay.recorder import TraceRecorder

_CALLS_UNTIL_COMPILED = 2
"""A streamer is given the prompt, then the first token; the decode step is compiled after that."""


def generate(
    model: MODEL,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; - reads standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    quantize: QUANTIZE = None,
    store: STORE = "auto",
    store_dir: STORE_DIR = None,
    expert_cache: EXPERT_CACHE = "25%",
    missing_weights: MISSING_WEIGHTS = "error",
    adapter: ADAPTER = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Decode through the compiled graph.")
    ] = True,
    option: COMPILE_OPTION = None,
    kv_cache: KV_CACHE = "static",
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 is greedy; above, sample at this temperature.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    threads: THREADS = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Record which experts were used, for specmoe replay, into this file.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Stream text from a Mixture-of-Experts model whose experts stay in RAM or on disk.

    The text goes to standard output, what it cost to standard error.

    [bold]Examples[/bold]

      specmoe generate Qwen/Qwen3-30B-A3B --prompt "Why is the sky blue?" --chat --expert-cache 8GiB

      specmoe generate ./checkpoint --store disk --expert-cache 25% --prompt "def main():"

      echo "Once upon a time" | specmoe generate ./checkpoint --prompt - --temperature 0.8
    """
    from specmoe_compile.system.output import check_writable, write_json

    options = compile_options(option)
    refuse_on_ranks("--trace", trace, "a trace is of all experts")
    refuse_on_ranks("--prompt -", prompt == "-", "they share standard input; give --prompt TEXT")
    json = first_ranks(json)
    check_writable(json)
    check_writable(trace, "trace")
    text = _prompt_text(prompt)
    if temperature and not 0.001 <= temperature <= 1000:
        raise ValueError(f"--temperature {temperature} is not 0 or between 0.001 and 1000.")

    with phase("starting PyTorch and transformers"):
        import torch
        import transformers  # noqa: F401

        import specmoe_compile

    if compile:
        require_compiler(device, options)
    tokenizer = quiet_tokenizer(model, threads)
    ids = _encode(tokenizer, text, chat=chat)
    inner: Any = specmoe_compile.from_pretrained(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        store=store,
        store_dir=store_dir,
        expert_cache=expert_cache,
        adapter=adapter,
        missing_weights=missing_weights,
        **split_of_ranks(),
    )
    options = with_cuda_graphs(
        options,
        device=inner.device,
        store=fetched_from(inner),
        kv_cache=kv_cache,
    )
    _check_length(inner.config, ids.shape[1], max_new_tokens)
    runner = torch.compile(inner, backend="specmoe", options=options) if compile else inner
    settings: dict[str, Any] = {"do_sample": temperature > 0.0}
    if temperature > 0.0:
        settings["temperature"] = temperature
    if kv_cache == "static":
        settings["cache_implementation"] = "static"
    torch.manual_seed(seed)
    recorder = _recorder(inner) if trace is not None else None
    result = stream(runner, tokenizer, ids.to(inner.device), max_new_tokens, settings)
    if recorder is not None and trace is not None:
        recorder.trace(model).save(trace.expanduser())
    stats = specmoe_compile.stats(inner, all_ranks=True)
    print(_summary(result), file=sys.stderr)
    print(stats, file=sys.stderr)
    if json is not None:
        write_json(json, {"schema": 1, **result, "stats": stats.as_dict()})


def stream(
    model: Any,
    tokenizer: Any,
    ids: Any,
    max_new_tokens: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Generate once, text to standard output as it comes; returns times and tokens.

    Args:
        model: has `generate`.
        tokenizer: of the model.
        ids: [1, W] int64, the prompt.
        max_new_tokens: most tokens to generate.
        settings: further arguments of `generate`.
    """
    from transformers import TextStreamer

    from specmoe_compile.bench.records import spread
    from specmoe_compile.bench.timing import TokenClock

    reading = contextlib.ExitStack()
    calls = 0

    class _QuietUntilCompiled(TextStreamer):
        """Holds the text back until the second token: both steps are compiled by then."""

        held = ""

        def put(self, value: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > _CALLS_UNTIL_COMPILED:
                reading.close()
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if stream_end:
                reading.close()
            elif calls <= _CALLS_UNTIL_COMPILED:
                self.held += text
                return
            super().on_finalized_text(self.held + text, stream_end=stream_end)
            self.held = ""

    clock = TokenClock(inner=_QuietUntilCompiled(tokenizer, skip_prompt=False))
    with reading:
        reading.enter_context(phase("reading the prompt"))
        clock.start()
        out = model.generate(
            ids,
            max_new_tokens=max_new_tokens,
            streamer=clock,
            pad_token_id=_pad_token(tokenizer),
            **settings,
        )
    tokens = out[0, ids.shape[1] :].tolist()
    return {
        "prompt_tokens": ids.shape[1],
        "tokens": tokens,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "ttft_ms": clock.ttft_ms,
        "tpot_ms": spread(clock.intervals_ms) if clock.intervals_ms else None,
    }


def _recorder(model: Any) -> TraceRecorder:
    from specmoe_compile.hf.attach import session_of
    from specmoe_compile.replay.recorder import TraceRecorder

    return TraceRecorder(session_of(model))


def _prompt_text(prompt: str | None) -> str:
    if prompt is None:
        raise ValueError(
            "There is no prompt: give --prompt TEXT, or --prompt - for standard input."
        )
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # what the shell could not decode is in it as surrogates
    except UnicodeError as error:
        raise ValueError(
            "The prompt is not UTF-8 text: convert it first, for example with iconv."
        ) from error
    if not text:
        raise ValueError("The prompt is empty: give --prompt some text to continue.")
    return text


def _encode(tokenizer: Any, text: str, *, chat: bool) -> Any:
    """Prompt as [1, W] int64, at least one token."""
    if chat and not tokenizer.chat_template:
        raise ValueError("This model has no chat template: leave out --chat.")
    try:
        if chat:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            ).input_ids
        else:
            ids = tokenizer(text, return_tensors="pt").input_ids
    except Exception as error:  # the tokenizers library and templates raise plain ones
        raise ValueError(f"The model's tokenizer does not take the prompt: {error}") from error
    if ids.shape[1] == 0:
        raise ValueError("The prompt is empty once it is tokens: give --prompt some more text.")
    return ids


def _check_length(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `ValueError` where a text would be longer than the model's positions."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and prompt_tokens + new_tokens > longest:
        raise ValueError(
            f"The prompt has {prompt_tokens} tokens and --max-new-tokens asks for {new_tokens}"
            f" more, but the model knows {longest} positions: give at most"
            f" {max(longest - prompt_tokens, 0)}."
        )


def _pad_token(tokenizer: Any) -> int | None:
    pad: int | None = tokenizer.pad_token_id
    eos: int | None = tokenizer.eos_token_id
    return eos if pad is None else pad


def _summary(result: dict[str, Any]) -> str:
    parts = [
        f"{len(result['tokens'])} tokens after a prompt of {result['prompt_tokens']}",
        f"first token after {result['ttft_ms'] / 1e3:.1f} s",
    ]
    if result["tpot_ms"] is not None:
        p50 = result["tpot_ms"]["p50"]
        parts.append(f"then {p50:.1f} ms per token (median; compilation in the first few)")
    return "\n" + ", ".join(parts) + "."
