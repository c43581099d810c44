"""`specmoe bench`: compare ways of running one model, each in its own process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from specmoe_compile.cli.options import (
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
    STORE_DIR,
    THREADS,
    compile_options,
    require_compiler,
)
from specmoe_compile.cli.ranks import first_ranks, refuse_on_ranks
from specmoe_compile.system.launched import launched

DEFAULT_ARMS = "accelerate,on_demand,cache,resident"
RANKED_ARMS = "on_demand,cache,specmoe"
"""By default, where several processes split the model: Hugging Face's arms run in one."""
DEFAULT_PROMPT = (
    "def merge_sorted(left, right):\n"
    '    """Merge two sorted lists into one sorted list."""\n'
    "    merged = []\n"
    "    i = j = 0\n"
    "    while i < len(left) and j < len(right):\n"
)
_RANDOM_PROMPT_TOKENS = 32


def bench(
    model: MODEL,
    arms: Annotated[
        str, typer.Option(help="What to compare, comma-separated; see below.", metavar="LIST")
    ] = DEFAULT_ARMS,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 64,
    expert_cache: EXPERT_CACHE = "25%",
    missing_weights: MISSING_WEIGHTS = "error",
    memory_cap: Annotated[
        str | None,
        typer.Option(
            help="Limit for arms that can keep one, page cache included, such as 700MiB.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times each arm runs: A B A B ...")] = 3,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Prompts, separated by lines of three dashes.", show_default=False),
    ] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    quantize: QUANTIZE = None,
    store_dir: STORE_DIR = None,
    kv_cache: KV_CACHE = "static",
    option: COMPILE_OPTION = None,
    warmup_tokens: Annotated[
        int, typer.Option(min=3, help="Tokens generated before anything is timed.")
    ] = 8,
    skip_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens after each first one that are not timed.")
    ] = 4,
    threads: THREADS = None,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Measure time per token of one model, run in several ways.

    Each arm runs in a process of its own, one after the other, over and over (A B C A B C), so that
    a machine that changes its speed does so to all of them. Decoding is greedy.

    [bold]Arms[/bold]

      eager            Hugging Face as it comes, all experts in memory: the reference for tokens

      eager_loop       the same with experts_implementation="eager", a loop over experts

      accelerate       Hugging Face device_map disk offload, untouched, all decoder layers on disk

      accelerate_auto  the same with device_map="auto" and as much memory as the expert cache

      accelerate_cpu   device_map with all decoder layers in RAM

      mmap             Hugging Face with its parameters mapped from a file: the page cache caches

      llama_cpp        llama.cpp, mapped from a GGUF of the same weights (needs the extra peers)

      on_demand        specmoe without a cache: every expert is fetched when it is needed

      cache            specmoe with an expert cache (--expert-cache)

      prefetch         on_demand with prefetch: no cache but the buffers of two layers

      specmoe          specmoe as it comes: expert cache, and prefetch where it pays, exact

      default_vector   the same; default vectors in place of light missing experts (approximate)

      commit           the same; the predicted experts are executed as they are (approximate)

      resident         specmoe with all experts in memory

    [bold]Examples[/bold]

      specmoe bench ./checkpoint --arms accelerate,cache --new-tokens 64 --json out.json

      specmoe bench ./checkpoint --memory-cap 700MiB --dtype bfloat16

      torchrun --nproc-per-node 2 -m specmoe_compile.cli.main bench ./checkpoint
    """
    from specmoe_compile.bench.arms import ARMS, checked_arms
    from specmoe_compile.bench.measure import measure
    from specmoe_compile.system.output import check_writable, quiet_transformers, write_json
    from specmoe_compile.system.sizes import parse_size

    names = _arms_of_ranks(checked_arms(arms), given=arms)
    refuse_on_ranks("--memory-cap", memory_cap, "a cap is of one")
    json = first_ranks(json)
    options = compile_options(option)
    parse_size(expert_cache, total_bytes=1 << 40, option="--expert-cache")
    cap_bytes = None
    if memory_cap is not None:
        cap_bytes = parse_size(memory_cap, total_bytes=_ram_bytes(), option="--memory-cap")
    if new_tokens < skip_tokens + 3:
        raise ValueError(
            f"--new-tokens {new_tokens} leaves nothing to time after the first token and"
            f" --skip-tokens {skip_tokens}: give at least {skip_tokens + 3}."
        )
    check_writable(json)
    if any(ARMS[name].options is not None for name in names):
        require_compiler(device, options)
    quiet_transformers()
    prompts, prompt_note = load_prompts(model, prompt_file)
    description = describe_model(model, dtype)
    settings: dict[str, Any] = {
        "new_tokens": new_tokens,
        "warmup_tokens": warmup_tokens,
        "skip_tokens": skip_tokens,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "expert_cache": expert_cache,
        "missing_weights": missing_weights,
        "kv_cache": kv_cache,
        "options": options,
        "threads": threads,
    }
    result = measure(
        model,
        names,
        prompts,
        settings,
        store_dir=store_dir,
        memory_cap_bytes=cap_bytes,
        repeats=repeats,
    )
    result["model"] = description
    result["prompts"] = prompt_note
    print_table(result)
    if json is not None:
        write_json(json, result)
    if result["failed"]:
        raise typer.Exit(1)


def _arms_of_ranks(names: list[str], *, given: str) -> list[str]:
    """The arms, or those that a split model can have where several processes were started."""
    from specmoe_compile.bench.arms import ARMS

    if launched().size == 1:
        return names
    if given == DEFAULT_ARMS:
        return RANKED_ARMS.split(",")
    others = [name for name in names if ARMS[name].policy is None]
    refuse_on_ranks(f"--arms {','.join(others)}", others, "specmoe's own arms split the model")
    return names


def load_prompts(model: str, prompt_file: Path | None) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts as token ids, and what to note about them.

    Random ids stand in for the default prompt where a model has no tokenizer.
    """
    import hashlib

    import torch

    from specmoe_compile.cli.tokenizer import load_tokenizer

    if prompt_file is not None:
        text = prompt_file.expanduser().read_text(encoding="utf-8")
        texts = [part for part in text.split("\n---\n") if part.strip()]
        if not texts:
            raise ValueError(f"--prompt-file {prompt_file} holds no prompt.")
    else:
        texts = [DEFAULT_PROMPT]
    folder = Path(model)
    if prompt_file is None and folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        vocabulary = describe_model(model, "auto")["vocabulary"]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (1, _RANDOM_PROMPT_TOKENS), generator=generator).tolist()
        return ids, {"count": 1, "tokens": [_RANDOM_PROMPT_TOKENS], "source": "random ids, seed 0"}
    tokenizer = load_tokenizer(model)
    ids = [tokenizer(text).input_ids for text in texts]
    return ids, {
        "count": len(ids),
        "tokens": [len(row) for row in ids],
        "source": "built-in" if prompt_file is None else prompt_file.name,
        "sha256": hashlib.sha256("\n---\n".join(texts).encode()).hexdigest(),
    }


def describe_model(model: str, dtype: str) -> dict[str, Any]:
    """Shape and sizes of a model, without loading it.

    Raises:
        CheckpointError: the folder is not a checkpoint.
        UnsupportedModelError: it has no experts.
    """
    import torch

    from specmoe_compile.bench.hf_arms import meta_model
    from specmoe_compile.hf.checkpoint import check_checkpoint_folder
    from specmoe_compile.runtime.experts.module import find_experts_layers, find_top_k

    if Path(model).is_dir():
        check_checkpoint_folder(Path(model))
    modules = meta_model(model)
    layers = find_experts_layers(modules)
    stored = modules.config.dtype or torch.float32
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    parameters = sum(p.numel() for p in modules.parameters())
    experts = sum(p.numel() for layer in layers for p in layer.module.parameters(recurse=False))
    return {
        "name": Path(model).name if Path(model).is_dir() else model,
        "class": type(modules).__name__,
        "dtype": str(wanted).removeprefix("torch."),
        "moe_layers": len(layers),
        "experts": [layer.num_experts for layer in layers],
        "top_k": find_top_k(modules, layers),
        "expert_bytes": experts * wanted.itemsize,
        "other_bytes": (parameters - experts) * wanted.itemsize,
        "bytes_per_expert": experts * wanted.itemsize // sum(layer.num_experts for layer in layers),
        "vocabulary": modules.config.get_text_config().vocab_size,
    }


def print_table(result: Mapping[str, Any]) -> None:
    """Print what was measured, and which arms failed."""
    from rich.console import Console

    from specmoe_compile.cli.tables import print_bench

    if result["arms"]:
        print_bench(result["arms"], result["model"])
    for name, reason in result["failed"].items():
        Console().print(f"[red]{name} failed:[/red] {reason}")


def _ram_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
