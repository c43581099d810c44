"""`specmoe serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specmoe_compile.bench.cuda_graphs import fetched_from, with_cuda_graphs
from specmoe_compile.cli.options import (
    COMPILE_OPTION,
    DEBUG,
    DEVICE,
    DTYPE,
    EXPERT_CACHE,
    MISSING_WEIGHTS,
    MODEL,
    QUANTIZE,
    STORE,
    STORE_DIR,
    THREADS,
    compile_options,
    require_compiler,
)

if TYPE_CHECKING:
    from specmoe_compile.serve.engine import Engine
    from specmoe_compile.serve.metrics import Metrics

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_LONGEST_BY_DEFAULT = 4096


def serve(
    model: MODEL,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    quantize: QUANTIZE = None,
    store: STORE = "auto",
    store_dir: STORE_DIR = None,
    expert_cache: EXPERT_CACHE = "25%",
    missing_weights: MISSING_WEIGHTS = "error",
    option: COMPILE_OPTION = None,
    threads: THREADS = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SPECMOE_API_KEY",
            show_envvar=False,
            help="What clients must send; needed with a --host that others reach. Rather set"
            " SPECMOE_API_KEY: others can read a command line.",
            show_default=False,
            metavar="KEY",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more are told to come again.")
    ] = 16,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Most tokens of prompt and answer; memory for so many is taken at the start. By"
            f" default {_LONGEST_BY_DEFAULT}, or what the model takes if that is less.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--served-name",
            help="The model's name for clients. By default as given.",
            show_default=False,
            metavar="ALIAS",
        ),
    ] = None,
    debug: DEBUG = False,
) -> None:
    """Answer OpenAI's API (completions and chat) with one model, one generation at a time.

    [bold]Examples[/bold]

      specmoe serve Qwen/Qwen3-30B-A3B --expert-cache 8GiB

      SPECMOE_API_KEY=secret specmoe serve ./checkpoint --host 0.0.0.0 --max-context 16384
    """
    started_s = time.perf_counter()
    options = compile_options(option)
    check_packages()
    require_compiler(device, options)

    from specmoe_compile.serve.server import bind, check_exposure, warm_up
    from specmoe_compile.serve.server import serve as run_server

    check_exposure(host, api_key)
    bound = bind(host, port)
    logging.getLogger("specmoe_compile.serve").setLevel(logging.INFO)

    import specmoe_compile
    from specmoe_compile.cli.tokenizer import quiet_tokenizer
    from specmoe_compile.serve.app import make_app
    from specmoe_compile.serve.guards import is_loopback
    from specmoe_compile.serve.metrics import Metrics

    tokenizer = quiet_tokenizer(model, threads)
    check_positions(model, max_context)
    inner: Any = specmoe_compile.from_pretrained(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        store=store,
        store_dir=store_dir,
        expert_cache=expert_cache,
        missing_weights=missing_weights,
    )
    try:
        metrics = Metrics()
        limits = {
            "max_context": context_length(inner.config, max_context),
            "max_queue": max_queue,
            "threads": threads,
        }
        engine = _engine(inner, tokenizer, options, metrics, limits)
        logging.getLogger("specmoe_compile.serve").info("Compiling ...")
        warm_up(engine)
        app = make_app(
            engine,
            metrics,
            name=name or model,
            api_key=api_key,
            loopback_only=is_loopback(host) and not api_key,
        )
        run_server(app, engine, bound, started_s=started_s)
    finally:
        specmoe_compile.close(inner)


def _engine(
    inner: Any,
    tokenizer: Any,
    options: dict[str, Any],
    metrics: Metrics,
    limits: dict[str, Any],
) -> Engine:
    """Compile an offloaded model for an engine; `limits` are arguments of the engine."""
    import torch

    import specmoe_compile
    from specmoe_compile.serve.engine import Engine

    options = with_cuda_graphs(
        options, device=inner.device, store=fetched_from(inner), kv_cache="static"
    )
    return Engine(
        torch.compile(inner, backend="specmoe", options=options),
        tokenizer,
        on_first_token=metrics.on_first_token,
        on_token=metrics.on_token,
        on_job=lambda: metrics.note_stats(specmoe_compile.stats(inner)),
        **limits,
    )


def check_packages() -> None:
    """Raise `ValueError` naming the extra if the server's packages are not installed."""
    import importlib.util

    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The server needs {', '.join(missing)}: pip install 'specmoe-compile[serve]'."
        )


def check_positions(model: str, asked: int | None) -> None:
    """Raise `ValueError` for a `--max-context` beyond the model, before anything is loaded."""
    from transformers import AutoConfig

    if asked is None:
        return
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception:  # what is wrong with a checkpoint is for the loader to say
        return
    context_length(config, asked)


def context_length(config: Any, asked: int | None) -> int:
    """The longest context; raises `ValueError` if the model takes less than was asked for."""
    text_config = config.get_text_config()
    most: int | None = getattr(text_config, "max_position_embeddings", None)
    if asked is None:
        return min(_LONGEST_BY_DEFAULT, most or _LONGEST_BY_DEFAULT)
    if most is not None and asked > most:
        raise ValueError(
            f"--max-context {asked} is more than this model's {most} positions: give at most"
            f" {most}."
        )
    return asked
