"""`specmoe eval`: what each policy costs in output, and what it saves in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specmoe_compile.cli.fidelity_report import check_documents, report
from specmoe_compile.cli.options import (
    COMPILE_OPTION,
    DEBUG,
    DTYPE,
    EXPERT_CACHE,
    JSON,
    MISSING_WEIGHTS,
    MODEL,
    QUANTIZE,
    STORE_DIR,
    THREADS,
    compile_options,
    require_compiler,
)
from specmoe_compile.cli.ranks import first_ranks, refuse_on_ranks
from specmoe_compile.cli.text import TEXT, read_tokens, windows
from specmoe_compile.system.launched import launched, split_of_ranks

if TYPE_CHECKING:
    from specmoe_compile.calibrate.calibration import Calibration
    from specmoe_compile.calibrate.fidelity import PolicyRun

DEFAULT_POLICIES = (
    "exact",
    "default_vector=0.05",
    "default_vector=0.1",
    "default_vector=0.2",
    "commit",
    "commit=true",
)
_RAM_SHARE = 0.6  # of the RAM that is free, for the reference next to the offloaded model


def evaluate(
    model: MODEL,
    text: TEXT,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="exact, default_vector=THRESHOLD, commit or commit=true. Repeatable.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that never speculate, such as 0,1; none; or auto. Repeatable.",
            metavar="LIST",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded for the loss.")] = 4096,
    window: Annotated[int, typer.Option(min=4, help="Tokens per window.")] = 256,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of a window that are read at once, exactly.")
    ] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to continue.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per prompt.")] = 64,
    reference: Annotated[
        Literal["auto", "plain", "offloaded"],
        typer.Option(
            help="plain: the untouched model, all in memory; offloaded: this model, exact."
        ),
    ] = "auto",
    dtype: DTYPE = "auto",
    quantize: QUANTIZE = None,
    store_dir: STORE_DIR = None,
    expert_cache: EXPERT_CACHE = "25%",
    missing_weights: MISSING_WEIGHTS = "error",
    option: COMPILE_OPTION = None,
    threads: THREADS = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw recall and drift per layer here (svg, png).", show_default=False),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables here.", show_default=False)
    ] = None,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Compare policies with the unmodified model: loss, agreement, and bytes read per token.

    Everything decodes one token at a time with experts on disk. Loss is over held-out text that is
    fed token by token; greedy agreement is over prompts that are continued freely.

    [bold]Examples[/bold]

      specmoe eval ./checkpoint --text held_out.txt --json fidelity.json --plot drift.svg

      specmoe eval ./checkpoint --text held_out.txt --policy commit --skip none --skip 0,1
    """
    from specmoe_compile.system.output import check_writable, write_json

    if missing_weights == "random":
        if reference == "plain":
            raise ValueError(
                "--missing-weights random draws other weights for the model of --reference plain:"
                " give --reference offloaded."
            )
        reference = "offloaded"
    per_layer = "recall per layer is of all experts"
    refuse_on_ranks("--skip auto", "auto" in (skip or ()), per_layer)
    refuse_on_ranks("--plot", plot, per_layer)
    json, markdown = first_ranks(json), first_ranks(markdown)
    check_writable(json)
    check_documents(plot, markdown)
    options = compile_options(option)
    require_compiler("cpu", options)
    if context >= window - 1:
        raise ValueError(
            f"--context {context} leaves nothing of a --window of {window} to decode: give at most"
            f" {window - 2}."
        )
    for name in policy or DEFAULT_POLICIES:
        parse_policy(name)

    from specmoe_compile.cli.tokenizer import quiet_tokenizer

    ids = read_tokens(text, quiet_tokenizer(model, threads))
    count = -(-tokens // (window - 1 - context))
    parts = {
        "windows": windows(ids, count=count, length=window, path=text),
        "prompts": windows(ids, count=prompts, length=prompt_tokens, path=text),
    }
    sizes = {"context": context, "new_tokens": new_tokens}
    loading = {
        "dtype": dtype,
        "quantize": quantize,
        "store_dir": store_dir,
        "expert_cache": expert_cache,
        "missing_weights": missing_weights,
    }
    result = measure(
        model,
        policy or DEFAULT_POLICIES,
        skip or ["none"],
        parts,
        sizes,
        loading,
        options,
        reference,
    )
    report(result, plot=plot, markdown=markdown)
    if json is not None:
        write_json(json, result)


def measure(
    model: str,
    policies: Sequence[str],
    skips: Sequence[str],
    parts: Mapping[str, Any],
    sizes: Mapping[str, int],
    loading: Mapping[str, Any],
    options: Mapping[str, Any],
    reference: str,
    *,
    on_policy: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Load the model and measure every policy with every list of skipped layers.

    Args:
        model: checkpoint folder or id.
        policies: as `parse_policy` reads them. skips: none, auto, or layer numbers.
        parts: `windows` and `prompts`, [N, W] int64.
        sizes: `context` and `new_tokens`.
        loading: keyword arguments of `from_pretrained`. options: of `torch.compile`.
        reference: plain, offloaded or auto.
        on_policy: gets the result so far after each policy, to keep it if a later one fails.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    import specmoe_compile
    from specmoe_compile.calibrate.fidelity import Evaluator
    from specmoe_compile.hf.attach import session_of
    from specmoe_compile.options import CompileOptions

    split = {**loading, **split_of_ranks()}
    inner: Any = specmoe_compile.from_pretrained(model, device="cpu", store="disk", **split)
    plain = _plain_or_none(model, loading["dtype"], reference)
    evaluator = Evaluator(
        inner,
        session := session_of(inner),
        inner if plain is None else plain,
        windows=parts["windows"],
        prompts=parts["prompts"],
        options=CompileOptions.from_kwargs(options),
        **sizes,
    )
    layers = None if split_of_ranks() else _calibrated(inner, parts["windows"], model)
    from dataclasses import asdict

    # All policies with the first list, then with the next: an early stop leaves a whole curve.
    runs = dict.fromkeys(
        _run(parse_policy(n), skip, layers, len(session.layers)) for skip in skips for n in policies
    )
    found: list[dict[str, Any]] = []
    result = {
        "schema": 1,
        "model": model,
        "reference": "unmodified model" if plain is not None else "offloaded model, run eagerly",
        "expert_cache": str(loading["expert_cache"]),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "store_bytes": specmoe_compile.stats(inner, all_ranks=True).store_bytes,
        "top_k": session.top_k,
        "sizes": {**sizes, **{name: list(part.shape) for name, part in parts.items()}},
        "options": dict(options),
        "policies": found,
        "layers": [] if layers is None else [asdict(layer) for layer in layers.layers],
    }
    with tqdm(total=len(runs) * evaluator.steps_per_run, unit="text", leave=False) as bar:
        for run in runs:
            bar.set_description(run.name)
            found.append(evaluator.measure(run, bar.update).as_dict())
            if on_policy is not None:
                on_policy(result)
    return result


def _calibrated(model: Any, windows: Any, name: str) -> Calibration:
    """What predictions are worth, layer by layer: computed from one half, measured on the other."""
    from specmoe_compile.calibrate.calibration import calibrate

    half = max(1, len(windows) // 2)
    rest = windows[half:] if len(windows) > 1 else windows
    return calibrate(model, rest, name=name, held_out=windows[:half])


def parse_policy(text: str) -> PolicyRun:
    """Read exact, default_vector=THRESHOLD, commit or commit=true.

    Raises:
        ValueError: it is none of them.
    """
    from specmoe_compile.calibrate.fidelity import PolicyRun

    name, _, value = text.partition("=")
    if name == "exact" and not value:
        return PolicyRun()
    if name == "commit" and value in ("", "predicted"):
        return PolicyRun(policy="commit")
    if name == "commit" and value == "true":
        return PolicyRun(policy="commit", commit_weights="true")
    if name == "default_vector":
        try:
            threshold = float(value)
        except ValueError:
            threshold = -1.0
        if 0.0 <= threshold <= 1.0:
            return PolicyRun(policy="default_vector", threshold=threshold)
    raise ValueError(
        f"--policy {text!r} is not valid: give exact, default_vector=THRESHOLD (0 to 1), commit or"
        " commit=true."
    )


def _run(run: PolicyRun, skip: str, layers: Calibration | None, count: int) -> PolicyRun:
    """The policy with a list of skipped layers; exact output knows no difference."""
    from dataclasses import replace

    if run.policy == "exact":
        return run
    return replace(run, skip_layers=_skipped(skip, run, layers, count))


def _skipped(text: str, run: PolicyRun, layers: Calibration | None, count: int) -> tuple[int, ...]:
    if text == "none":
        return ()
    if text == "auto" and layers is not None:
        return layers.poor_layers(run.policy)
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = (-1,)
    if not all(0 <= number < count for number in numbers):
        raise ValueError(
            f"--skip {text!r} is not valid: give none, auto, or MoE layer numbers from 0 to"
            f" {count - 1}, such as 0,1."
        )
    return numbers


def _plain_or_none(model: str, dtype: str, which: str) -> Any:
    """The untouched model, all weights in memory; None where the offloaded one must do."""
    from transformers import AutoModelForCausalLM

    from specmoe_compile.system.machine import available_ram_bytes

    if which == "offloaded":
        return None
    if which == "auto":
        weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        weights *= launched().local_size  # each rank holds it
        if not weights or weights > _RAM_SHARE * available_ram_bytes():
            return None
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(model, dtype=dtype).eval().requires_grad_(False)
