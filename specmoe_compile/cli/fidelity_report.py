"""Tables, document and drawing of `specmoe eval`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = (
    "policy",
    "loss",
    "increase",
    "KL",
    "top-1 same",
    "greedy same",
    "whole prompts",
    "read/token",
    "of exact",
    "hits",
    "ms/token",
)
_LAYER_KEYS = ("recall", "residual_recall", "cosine", "residual_cosine")
_LAYER_HEADS = ("recall", "without vectors", "cosine", "without vectors")


def check_documents(plot: Path | None, markdown: Path | None) -> None:
    """Raise before any work is done where a document could not be written at the end."""
    for option, path in (("plot", plot), ("markdown", markdown)):
        if path is not None and not path.expanduser().parent.is_dir():
            raise FileNotFoundError(
                f"The folder of --{option} {path} does not exist: create it first."
            )
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib, or leave --plot out.")


def policy_rows(policies: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row per policy, under `HEAD`; bytes are against the exact policy if it was measured."""
    from specmoe_compile.system.sizes import format_bytes

    exact = next((p["bytes_per_token"] for p in policies if p["policy"] == "exact"), None)
    rows: list[tuple[str, ...]] = []
    for found in policies:
        read = found["bytes_per_token"]
        rows.append(
            (
                found["name"],
                f"{found['loss_nats']:.4f}",
                f"{found['loss_increase_nats']:+.4f}",
                f"{max(0.0, found['kl_nats']):.4f}",
                f"{100 * found['top1_agreement']:.2f} %",
                f"{100 * found['greedy_agreement']:.2f} %",
                f"{found['greedy_same_prompts']}/{found['greedy_prompts']}",
                format_bytes(round(read)),
                f"{100 * read / exact:.1f} %" if exact else "-",
                f"{100 * found['hit_rate']:.1f} %",
                # Results of an older commit lack it.
                f"{found['ms_per_token']:.2f}" if "ms_per_token" in found else "-",
            )
        )
    return rows


def report(result: Mapping[str, Any], *, plot: Path | None, markdown: Path | None) -> None:
    """Print the tables; write the document and the drawing."""
    from specmoe_compile.cli.tables import print_table

    print(
        f"{result['model']}, {result['dtype']}, expert cache {result['expert_cache']};"
        f" loss in nats per token, against the {result['reference']}"
    )
    print_table(HEAD, policy_rows(result["policies"]), keys=1)
    if plot is not None:
        draw_layers(result["layers"], plot)
        print(f"Recall and drift per layer are drawn in {plot}.", file=sys.stderr)
    if markdown is not None:
        markdown.expanduser().write_text(as_markdown(result, plot), encoding="utf-8")


def as_markdown(result: Mapping[str, Any], plot: Path | None) -> str:
    """The tables as a document."""
    from specmoe_compile.cli.tables import markdown_table

    layers = [
        (
            str(index),
            *("-" if layer[key] is None else f"{layer[key]:.3f}" for key in _LAYER_KEYS),
        )
        for index, layer in enumerate(result["layers"])
    ]
    sizes = result["sizes"]
    lines = [
        "# Fidelity of the policies",
        "",
        f"{result['model']}, {result['dtype']}, expert cache {result['expert_cache']} on disk,"
        " decoding one token at a time. Loss, KL divergence (nats per token), top-1 agreement and"
        f" time: {result['policies'][0]['tokens']} held-out tokens fed one by one. Greedy"
        f" agreement: {sizes['prompts'][0]} prompts x {sizes['new_tokens']} tokens. Reference: the"
        f" {result['reference']}.",
        "",
        markdown_table(HEAD, policy_rows(result["policies"])),
        "",
        "Recall of each layer's experts from the layer before, and cosine of the quasi-hidden"
        " state with the true one; with default vectors, and with nothing in the experts' place.",
        "",
        markdown_table(("layer", *_LAYER_HEADS), layers),
        "",
    ]
    if plot is not None:
        lines += [f"![recall and drift per layer]({plot.name})", ""]
    return "\n".join(lines)


def draw_layers(layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw recall and drift (1 - cosine) of every predicted layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = [index for index, layer in enumerate(layers) if layer["recall"] is not None]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for key, label in (("", "default vectors"), ("residual_", "experts left out")):
        recall = [layers[index][f"{key}recall"] for index in numbers]
        drift = [1 - layers[index][f"{key}cosine"] for index in numbers]
        left.plot(numbers, recall, marker="o", label=label)
        right.plot(numbers, drift, marker="o", label=label)
    left.set(xlabel="MoE layer", ylabel="recall of its experts", ylim=(0, 1), xticks=numbers)
    right.set(xlabel="MoE layer", ylabel="drift: 1 - cosine", xticks=numbers)
    right.set_ylim(bottom=0)
    right.legend()
    figure.savefig(path.expanduser())
    pyplot.close(figure)
