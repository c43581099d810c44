"""`specmoe demo`: the whole path on the reference model that the repository carries."""

from __future__ import annotations

import hashlib
import json as json_module
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from specmoe_compile.cli.options import DEBUG, EXPERT_CACHE, JSON
from specmoe_compile.errors import SpecMoEError

DEFAULT_PROMPT = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self):\n'
_DISK_COPIES = 3  # the widened checkpoint, the expert store, accelerate's offload folder
_COMPARED_TOKENS = 24


def demo(
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)] = (
        DEFAULT_PROMPT
    ),
    new_tokens: Annotated[int, typer.Option(min=32, help="Tokens to generate.")] = 96,
    expert_cache: EXPERT_CACHE = "25%",
    record_mib: Annotated[
        float, typer.Option(min=0.09, help="Size of one expert; the reference model has 256.")
    ] = 3.0,
    memory_cap: Annotated[
        str, typer.Option(help="Memory limit of the comparison, where permitted.", metavar="SIZE")
    ] = "700MiB",
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

    Makes a copy of the repository's reference model with experts of 3 MiB (256 experts, 805 MB, the
    same function), packs them into a store on disk, generates through the compiled graph, and
    compares tokens, time and memory with the unmodified model and with Hugging Face's disk offload.
    Takes a few minutes on two cores, and about 2.5 GB of disk.

    [bold]Examples[/bold]

      specmoe demo

      specmoe demo --prompt "import os" --new-tokens 200 --no-compare
    """
    from rich.console import Console

    from specmoe_compile.system.compilers import check_compiler
    from specmoe_compile.system.machine import cache_folder
    from specmoe_compile.system.output import check_writable, quiet_transformers, write_json
    from specmoe_compile.system.sizes import parse_size

    check_writable(json)
    check_compiler("cpu")
    parse_size(expert_cache, total_bytes=1 << 40, option="--expert-cache")
    cap_bytes = parse_size(memory_cap, total_bytes=1 << 40, option="--memory-cap")
    root = repository_root()
    place = cache_folder() / "demo" if folder is None else folder.expanduser()
    console = Console()
    quiet_transformers()

    console.rule("1. The model")
    model = widened_model(root, place, record_mib)
    store_dir = place / f"{model.name}-store"
    size_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    console.print(
        f"{size_bytes / 1e6:.0f} MB in {model}: the reference model, each expert widened to"
        f" {record_mib:g} MiB without changing what it computes."
    )

    console.rule("2. Its experts go to disk, and it generates")
    streamed = _generate(model, store_dir, prompt, new_tokens, expert_cache)
    _report(console, streamed, size_bytes)
    result: dict[str, Any] = {"schema": 1, "streamed": streamed}

    if compare:
        console.rule("3. The same model, run in other ways")
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


def repository_root() -> Path:
    """Return the root of the clone that this package runs from.

    Raises:
        SpecMoEError: it was installed without the repository, which holds the reference model.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "reference_model" / "checkpoint" / "config.json").is_file():
        raise SpecMoEError(
            "specmoe demo needs the reference model, which lies in the repository and not in the"
            " installed package: run make demo in a clone, or specmoe generate with a model of"
            " your own"
        )
    return root


def widened_model(root: Path, place: Path, record_mib: float, dtype: str = "float32") -> Path:
    """Return the folder of the reference model with larger experts, made on the first call.

    Args:
        root: of the repository.
        place: folder for it.
        record_mib: size of one expert.
        dtype: "float32" or "bfloat16".

    Raises:
        ValueError: this size is not possible.
        SpecMoEError: there is no room.
    """
    checkpoint = root / "benchmarks" / "reference_model" / "checkpoint"
    with (checkpoint / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    model = place / f"reference-{record_mib:g}mib-{dtype}-{digest}"
    if (model / "config.json").is_file():
        return model
    _check_record(checkpoint, record_mib, dtype)
    place.mkdir(parents=True, exist_ok=True)
    needed = int(_DISK_COPIES * 256 * record_mib * (1 << 20))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SpecMoEError(
            f"{place} has {free >> 20} MiB free, and this needs about {needed >> 20} MiB: choose"
            " another --folder"
        )
    command = [sys.executable, "-m", "benchmarks", "widen", str(model)]
    command += ["--record-mib", str(record_mib), "--dtype", dtype, "--no-verify"]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SpecMoEError(f"The reference model could not be widened to {record_mib:g} MiB.")
    return model


def _check_record(checkpoint: Path, record_mib: float, dtype: str) -> None:
    """Raise `ValueError` unless the size is that of an expert times a power of two."""
    config = json_module.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    item_bytes = 4 if dtype == "float32" else 2
    smallest = 3 * config["hidden_size"] * config["moe_intermediate_size"] * item_bytes
    copies, rest = divmod(record_mib * (1 << 20), smallest)
    if rest or copies < 1 or int(copies) & (int(copies) - 1):
        raise ValueError(
            f"--record-mib {record_mib:g} is not possible: give {smallest / (1 << 20):g} times a"
            " power of two, such as 0.75, 1.5, 3 or 6."
        )


def _generate(
    model: Path, store_dir: Path, prompt: str, new_tokens: int, expert_cache: str
) -> dict[str, Any]:
    """Load with the experts on disk, compile, stream; returns times, tokens and memory."""
    import time

    import torch

    import specmoe_compile
    from specmoe_compile.bench.worker import compile_seconds, peak_rss_bytes
    from specmoe_compile.cli.generate import load_tokenizer, stream

    tokenizer = load_tokenizer(str(model))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    before_bytes = peak_rss_bytes()
    started_s = time.perf_counter()
    inner: Any = specmoe_compile.from_pretrained(
        model, device="cpu", store="disk", store_dir=store_dir, expert_cache=expert_cache
    )
    load_s = time.perf_counter() - started_s
    compiled: Any = torch.compile(inner, backend="specmoe")
    settings = {
        "do_sample": False,
        "cache_implementation": "static",
        "min_new_tokens": new_tokens,
    }
    result = stream(compiled, tokenizer, ids, new_tokens, settings)
    stats = specmoe_compile.stats(inner)
    print(stats)
    specmoe_compile.close(inner)
    return {
        **result,
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


def _compare(
    console: Any,
    model: Path,
    store_dir: Path,
    streamed: dict[str, Any],
    expert_cache: str,
    cap_bytes: int,
    *,
    work_dir: Path,
) -> dict[str, Any]:
    """Run the unmodified model, disk offload and specmoe in processes of their own."""
    from specmoe_compile.bench.records import ArmJob
    from specmoe_compile.cli.bench import describe_model, permitted_cap, print_table, run_jobs
    from specmoe_compile.cli.tables import count_differing

    lengths = {
        "accelerate": _COMPARED_TOKENS,
        # Its graphs were compiled above: a compiler beside the model does not fit under the cap.
        "specmoe": len(streamed["tokens"]),
        "eager": len(streamed["tokens"]),
    }
    jobs = [
        ArmJob(
            arm=name,
            model=str(model),
            prompts=[streamed["prompt_ids"]],
            new_tokens=count,
            warmup_tokens=3,
            skip_tokens=2,
            device="cpu",
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
    differing = count_differing([streamed["tokens"]], reference["tokens"])
    result["differing_tokens"] = differing
    console.print(
        f"{len(streamed['tokens']) - differing} of {len(streamed['tokens'])} tokens equal the"
        " unmodified model's. accelerate: device_map disk offload, every decoder layer on disk;"
        " eager: everything in memory."
    )
    return result
