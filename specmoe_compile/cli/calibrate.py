"""`specmoe calibrate`: default vectors and what predictions are worth, from text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specmoe_compile.cli.options import (
    DEBUG,
    DEVICE,
    DTYPE,
    EXPERT_CACHE,
    JSON,
    MISSING_WEIGHTS,
    MODEL,
    STORE,
    STORE_DIR,
    THREADS,
)
from specmoe_compile.cli.text import TEXT, read_tokens, windows

if TYPE_CHECKING:
    from specmoe_compile.calibrate.calibration import Calibration

_HELD_OUT_SHARE = 4  # of the windows, every fourth is measured on and not learned from


def calibrate(
    model: MODEL,
    text: TEXT,
    out: Annotated[
        Path, typer.Option(help="The file to write.", show_default=False, metavar="FILE")
    ],
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of the text to use.")] = 65536,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 4,
    train_estimator: Annotated[
        bool,
        typer.Option(
            "--train-estimator", help="Train the predictors estimator and pre_attention too."
        ),
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Times that training sees each token.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    store: STORE = "auto",
    store_dir: STORE_DIR = None,
    expert_cache: EXPERT_CACHE = "25%",
    missing_weights: MISSING_WEIGHTS = "error",
    threads: THREADS = None,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Compute a model's default vectors, and measure how well its experts can be predicted.

    Three quarters of the text give the vectors, the rest measures them. The file is for
    [bold]-O default_vectors=FILE[/bold]; without one, vectors are learned while generating. It
    also says which layers [bold]-O skip_layers=auto[/bold] leaves out. With
    [bold]--train-estimator[/bold] it holds the trained predictors, which
    [bold]-O predictor=NAME[/bold] chooses.

    [bold]Examples[/bold]

      specmoe calibrate Qwen/Qwen3-30B-A3B --text notes.txt --out qwen3.safetensors

      specmoe generate Qwen/Qwen3-30B-A3B --prompt "Hello" -O default_vectors=qwen3.safetensors
    """
    from specmoe_compile.system.output import check_writable, write_json

    check_writable(json)
    out = out.expanduser()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder of --out {out} does not exist: create it first.")

    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    import specmoe_compile
    from specmoe_compile.calibrate.calibration import calibrate as run
    from specmoe_compile.cli.tokenizer import quiet_tokenizer
    from specmoe_compile.predict.training import TrainingConfig

    ids = read_tokens(text, quiet_tokenizer(model, threads))
    parts = windows(ids, count=max(2, tokens // window), length=window, path=text)
    if len(parts) < 2:
        raise ValueError(
            f"--text {text} has {len(ids)} tokens, calibration needs two windows of {window}: give"
            " more text, or a smaller --window."
        )
    measured = torch.arange(len(parts)) % _HELD_OUT_SHARE == 1
    learned, held_out = parts[~measured], parts[measured]
    inner: Any = specmoe_compile.from_pretrained(
        model,
        device=device,
        dtype=dtype,
        store=store,
        store_dir=store_dir,
        expert_cache=expert_cache,
        missing_weights=missing_weights,
    )
    training = TrainingConfig(epochs=epochs, seed=seed) if train_estimator else None
    total = (2 if train_estimator else 1) * len(learned) + 2 * len(held_out)
    with tqdm(total=total, unit="window", delay=2.0, leave=False) as bar:
        result = run(
            inner,
            learned,
            name=model,
            held_out=held_out,
            batch=batch,
            training=training,
            on_progress=bar.update,
        )
    result.save(out)
    print_calibration(result)
    print(f"Written to {out}.", file=sys.stderr)
    if json is not None:
        write_json(json, {"schema": 1, **as_dict(result)})


def as_dict(result: Calibration) -> dict[str, Any]:
    """A calibration without its tensors, for JSON."""
    from dataclasses import asdict

    return {
        "model": result.model,
        "fingerprint": result.fingerprint,
        "tokens": result.tokens,
        "measured_tokens": result.measured_tokens,
        "layers": [asdict(layer) for layer in result.layers],
        "trained": {name: trained.about() for name, trained in result.trained.items()},
        "fewest_samples": [int(count.min()) for count in result.samples],
        "experts_without_samples": [int((count == 0).sum()) for count in result.samples],
    }


def print_calibration(result: Calibration) -> None:
    """Print the table of layers."""
    from specmoe_compile.cli.tables import print_table

    print(
        f"{result.model}: predictions of each MoE layer from the one before,"
        f" {result.measured_tokens} tokens"
    )
    heads = ("layer", "recall", "without vectors", "cosine", "without vectors", "unseen")
    rows = [
        (
            str(index),
            _percent(layer.recall),
            _percent(layer.residual_recall),
            _cosine(layer.cosine),
            _cosine(layer.residual_cosine),
            str(int((result.samples[index] == 0).sum())),
            *(_percent(trained.recall[index]) for trained in result.trained.values()),
        )
        for index, layer in enumerate(result.layers)
    ]
    print_table((*heads, *result.trained), rows, keys=1)
    for index, layer in enumerate(result.layers):
        if layer.reason is not None and index > 0:
            print(f"Layer {index} is not predicted: {layer.reason}.", file=sys.stderr)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
