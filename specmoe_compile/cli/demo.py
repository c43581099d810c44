"""`specmoe demo`: the whole path on the reference model that comes with the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from specmoe_compile.cli.options import DEBUG, DEVICE, EXPERT_CACHE, JSON, require_compiler
from specmoe_compile.errors import SpecMoEError

DEFAULT_PROMPT = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self):\n'
_COMPARED_TOKENS = 24
_CAP_ALLOWANCE_BYTES = 256 << 20  # beside packages and expert cache: other weights, reads, graphs
_LEAST_CAP_BYTES = 700 << 20  # what the packages take is seen from 270 to 570 MiB


def demo(
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)] = (
        DEFAULT_PROMPT
    ),
    new_tokens: Annotated[int, typer.Option(min=32, help="Tokens to generate.")] = 96,
    device: DEVICE = "cpu",
    expert_cache: EXPERT_CACHE = "25%",
    record_mib: Annotated[
        float, typer.Option(min=0.09, help="Size of one expert; the reference model has 256.")
    ] = 3.0,
    memory_cap: Annotated[
        str | None,
        typer.Option(
            help="Memory limit of the comparison, where permitted. By default what Python with its"
            " packages takes, the expert cache and 256 MiB, and at least 700 MiB.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where the model and its store go. By default under the user's cache folder.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run the other ways of offloading too.")
    ] = True,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Watch a trained Mixture-of-Experts model generate while its experts stay on disk.

    Makes a copy of the reference model that comes with the package, with experts of 3 MiB (256
    experts, 805 MB, the same function), packs them into a store on disk, generates through the
    compiled graph, and compares tokens, time and memory with the unmodified model and with Hugging
    Face's disk offload. Takes a few minutes on two cores, and about 2.5 GB of disk.

    [bold]Examples[/bold]

      specmoe demo

      specmoe demo --prompt "import os" --new-tokens 200 --no-compare
    """
    from rich.console import Console

    from specmoe_compile.reference_model.widened import widened_model
    from specmoe_compile.system.machine import cache_folder
    from specmoe_compile.system.output import check_writable, quiet_transformers, write_json
    from specmoe_compile.system.sizes import parse_size

    check_writable(json)
    require_compiler(device, {})
    parse_size(expert_cache, total_bytes=1 << 40, option="--expert-cache")
    cap_bytes = None
    if memory_cap is not None:
        cap_bytes = parse_size(memory_cap, total_bytes=1 << 40, option="--memory-cap")
    place = cache_folder() / "demo" if folder is None else folder.expanduser()
    console = Console()
    quiet_transformers()

    console.rule("1. The model")
    model = widened_model(place, record_mib)
    store_dir = place / f"{model.name}-store"
    size_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    console.print(
        f"{size_bytes / 1e6:.0f} MB in {model}: the reference model, each expert widened to"
        f" {record_mib:g} MiB without changing what it computes."
    )

    console.rule("2. Its experts go to disk, and it generates")
    streamed = _generate(model, store_dir, prompt, new_tokens, expert_cache, device)
    _report(console, streamed, size_bytes)
    result: dict[str, Any] = {"schema": 1, "streamed": streamed}

    if compare:
        console.rule("3. The same model, run in other ways")
        if cap_bytes is None:
            cap_bytes = _default_cap(streamed)
        result |= _compare(
            console, model, store_dir, streamed, expert_cache, cap_bytes, work_dir=place
        )
    if json is not None:
        write_json(json, result)
    console.print(f"\nThe model and its store stay in {place}; delete the folder when you like.")
    if compare and result["differing_tokens"]:
        raise SpecMoEError(
            f"{result['differing_tokens']} of {new_tokens} tokens differ from the unmodified"
            " model's: this is a bug, please report it with the output of specmoe doctor"
        )


def _generate(
    model: Path, store_dir: Path, prompt: str, new_tokens: int, expert_cache: str, device: str
) -> dict[str, Any]:
    """Load with the experts on disk, compile, stream; returns times, tokens and memory."""
    import time

    import torch

    import specmoe_compile
    from specmoe_compile.bench.worker import compile_seconds, peak_rss_bytes
    from specmoe_compile.cli.generate import stream
    from specmoe_compile.cli.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    before_bytes = peak_rss_bytes()
    started_s = time.perf_counter()
    inner: Any = specmoe_compile.from_pretrained(
        model, device=device, store="disk", store_dir=store_dir, expert_cache=expert_cache
    )
    load_s = time.perf_counter() - started_s
    compiled: Any = torch.compile(inner, backend="specmoe")
    settings = {
        "do_sample": False,
        "cache_implementation": "static",
        "min_new_tokens": new_tokens,
    }
    result = stream(compiled, tokenizer, ids.to(inner.device), new_tokens, settings)
    stats = specmoe_compile.stats(inner)
    print(stats)
    specmoe_compile.close(inner)
    return {
        **result,
        "device": inner.device.type,
        "prompt_ids": ids[0].tolist(),
        "load_s": load_s,
        "compile_s": compile_seconds(),
        "rss_before_bytes": before_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "fast_tier_bytes": stats.fast_tier_bytes,
        "stats": stats.as_dict(),
    }


def _report(console: Any, streamed: dict[str, Any], size_bytes: int) -> None:
    from specmoe_compile.system.sizes import format_bytes

    peak, before = streamed["peak_rss_bytes"], streamed["rss_before_bytes"]
    console.print(
        f"\nLoading, with packing on the first run: {streamed['load_s']:.1f} s; compiling:"
        f" {streamed['compile_s']:.1f} s; then {streamed['tpot_ms']['p50']:.1f} ms per token."
    )
    console.print(
        f"Peak memory: {format_bytes(peak)}, of which {format_bytes(before)} were Python, PyTorch"
        f" and transformers before the model was loaded. Its weights are"
        f" {format_bytes(size_bytes)}; {format_bytes(streamed['fast_tier_bytes'])} are kept for"
        " experts."
    )


def _default_cap(streamed: dict[str, Any]) -> int | None:
    """What the packages take, the cache and some more; none on a GPU, where CUDA takes more."""
    if streamed["device"] != "cpu":
        return None
    packages_bytes, cache_bytes = streamed["rss_before_bytes"], streamed["fast_tier_bytes"]
    return max(_LEAST_CAP_BYTES, int(packages_bytes + cache_bytes + _CAP_ALLOWANCE_BYTES))


def _compared(tokens: int, console: Any) -> dict[str, int]:
    """Arms of the comparison and how many tokens each generates; says what is left out."""
    # specmoe's graphs were compiled above: a compiler beside the model does not fit under the cap.
    lengths = {"specmoe": tokens, "eager": tokens}
    if importlib.util.find_spec("accelerate") is not None:
        return {"accelerate": _COMPARED_TOKENS} | lengths
    console.print(
        "Hugging Face's disk offload is left out: it needs the package accelerate, which pip"
        " install 'specmoe-compile[bench]' brings.\n",
        markup=False,
    )
    return lengths


def _compare(
    console: Any,
    model: Path,
    store_dir: Path,
    streamed: dict[str, Any],
    expert_cache: str,
    cap_bytes: int | None,
    *,
    work_dir: Path,
) -> dict[str, Any]:
    """Run the unmodified model, disk offload and specmoe in processes of their own."""
    from specmoe_compile.bench.measure import permitted_cap, run_jobs
    from specmoe_compile.bench.records import ArmJob
    from specmoe_compile.cli.bench import describe_model, print_table
    from specmoe_compile.cli.tables import count_differing

    lengths = _compared(len(streamed["tokens"]), console)
    jobs = [
        ArmJob(
            arm=name,
            model=str(model),
            prompts=[streamed["prompt_ids"]],
            new_tokens=count,
            warmup_tokens=3,
            skip_tokens=2,
            device=streamed["device"],
            dtype="float32",
            expert_cache=expert_cache,
            store_dir=str(store_dir),
            work_dir=str(work_dir),
        )
        for name, count in lengths.items()
    ]
    result = run_jobs(jobs, repeats=1, memory_cap_bytes=permitted_cap(cap_bytes))
    result["model"] = describe_model(str(model), "float32")
    print_table(result)
    reference = next((arm for arm in result["arms"] if arm["name"] == "eager"), None)
    if reference is None:
        raise SpecMoEError(f"The unmodified model did not run: {result['failed']['eager']}")
    if "specmoe" in result["failed"]:
        raise SpecMoEError(
            f"specmoe did not run in the comparison: {result['failed']['specmoe']} Give it more"
            " with --memory-cap."
        )
    differing = count_differing([streamed["tokens"]], reference["tokens"])
    result["differing_tokens"] = differing
    console.print(
        f"{len(streamed['tokens']) - differing} of {len(streamed['tokens'])} tokens equal the"
        " unmodified model's. eager: everything in memory; accelerate: device_map disk offload,"
        " every decoder layer on disk."
    )
    return result
