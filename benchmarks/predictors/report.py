"""Writes docs/results/log/predictors.md from benchmarks/results/predictors.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kit.traffic import TRAFFIC_HEAD, traffic_cells
from benchmarks.speculation.report_timing import medians_text
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.predict.registry import DEFAULT_PREDICTOR, PREDICTORS
from specmoe_compile.system.sizes import format_bytes

Result = Mapping[str, Any]
NOT_MEASURED = "not measured"
TIMINGS = ("timing", "no_cache", "timing_always", "no_cache_always")
"""Phases that time every predictor."""
GROUPS = (
    (DEFAULT_PREDICTOR, ("residual", "previous_token"), "Without trained networks"),
    ("hybrid", ("estimator", "pre_attention"), "With them"),
)
"""Predictors that need the same preparation: the default, the others, and which preparation."""
_DEFAULT_NOTES = {
    DEFAULT_PREDICTOR: " (default without trained networks)",
    "hybrid": " (default with them)",
}


def write_report(result: Path, path: Path) -> None:
    """Write the document.

    Args:
        result: the JSON of the phases that were run; `recall` must be one.
        path: the document.

    Raises:
        FileNotFoundError: there is no result.
    """
    if not result.is_file():
        raise FileNotFoundError(f"There is no {result}: run the phase recall first.")
    found = json.loads(result.read_text(encoding="utf-8"))
    sections = [
        _head(found),
        "## All predictors\n\n" + _table(found) + "\n\n" + _verdict(found),
        _layers(found["recall"]),
        *(_traffic(found[name]) for name in TIMINGS if name in found),
        _NOTES,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _head(found: Result) -> str:
    recall = found["recall"]
    lines = [
        "# Predictors of experts on equal terms",
        "",
        "Written by `python -m benchmarks predictors` from `benchmarks/results/predictors.json`.",
        "",
        f"Trained on {recall['tokens']} tokens of training files of the reference model, measured"
        f" on {recall['held_out_tokens']} tokens of files that neither it nor any predictor saw"
        f" ({', '.join(recall['held_out_files'])}); windows of {recall['window']}, seed"
        f" {recall['seed']}, float32. Recall is that of the top {recall['top_k']}; whole set is the"
        " share of tokens of which all experts were predicted; both are means over the layers after"
        " the first.",
        "",
    ]
    for phase, part in found.items():
        if not isinstance(part, dict):
            continue
        names = ", ".join(f"{n} {v}" for n, v in part["versions"].items() if v is not None)
        machine = part["machine"]
        lines.append(
            f"- {phase}: commit {str(part['commit'])[:18]}, {machine['cpu']}, {machine['cores']}"
            f" cores, {format_bytes(machine['ram_bytes'])} RAM, GPU:"
            f" {machine['gpu']['name'] if machine['gpu'] else 'none'}; {names}."
        )
    return "\n".join(lines)


def mean(values: Sequence[float | None]) -> float:
    """Mean over the layers after the first."""
    known = [value for value in values[1:] if value is not None]
    return sum(known) / len(known)


def _table(found: Result) -> str:
    recall, cost = found["recall"], found.get("cost")
    timings = [found.get(name) for name in TIMINGS[:2]]
    rows = []
    for name in PREDICTORS:
        seen = recall["predictors"][name]
        parameters = seen["default_vector_parameters"] + seen["network_parameters"]
        rows.append(
            (
                f"`{name}`" + _DEFAULT_NOTES.get(name, ""),
                f"{mean(seen['recall']):.3f}",
                f"{mean(seen['whole']):.3f}",
                str(parameters),
                _training(seen, recall),
                NOT_MEASURED if cost is None else _cost(cost, seen, name),
                *(NOT_MEASURED if t is None else _tpot(t, name) for t in timings),
            )
        )
    unused = ("no prefetch", "-", "-", "0", "-", "0 us")
    both = (NOT_MEASURED if t is None else _tpot(t, "none") for t in timings)
    rows.append((*unused, *both))
    heads = ("predictor", "recall@k", "whole set", "parameters", "training", "cost per token")
    return markdown_table((*heads, "ms/token, cache", "ms/token, no cache"), rows)


def _verdict(found: Result) -> str:
    """Who wins among those that need the same preparation: by recall, and by time."""
    seen = found["recall"]["predictors"]
    lines = []
    for default, others, what in GROUPS:
        recall = {name: mean(seen[name]["recall"]) for name in (default, *others)}
        best = max(recall, key=lambda name: recall[name])
        line = (
            f"- {what}: the default is `{default}`. The highest recall is `{best}`'s,"
            f" {recall[best]:.3f} against {recall[default]:.3f} of `{default}`."
        )
        same = [name for name in others if _same_networks(seen[name], seen[default])]
        rivals = [name for name in others if name not in same]
        for phase in TIMINGS[:2]:
            if phase in found:
                line += " " + _verdict_by_time(found[phase], default, rivals)
                if _has_samples(found[phase]):
                    for name in same:
                        line += (
                            f" `{name}` is the same network in every layer here: that it takes"
                            f" {median(ratios_to(found[phase], name, default)):.3f} of the time is"
                            " how far two equal arms are apart."
                        )
        lines.append(line)
    return "\n".join(lines)


def _same_networks(one: Result, other: Result) -> bool:
    """Whether two predictors are one network in every layer, as the hybrid can be."""
    parameters = one["network_parameters"]
    same = parameters == other["network_parameters"] and one["recall"] == other["recall"]
    return bool(parameters and same)


def _verdict_by_time(timing: Result, default: str, others: Sequence[str]) -> str:
    """The fastest of a group, and whether all repeats agree."""
    if not _has_samples(timing):
        p50 = {name: timing["arms"][name]["tpot_ms"]["p50"] for name in (default, *others, "none")}
        fastest = min((default, *others), key=lambda name: p50[name])
        return (
            f"By time, {_where(timing)}, `{fastest}` comes first with {p50[fastest]:.1f} ms,"
            f" against {p50[default]:.1f} of `{default}` and {p50['none']:.1f} without a prefetch;"
            f" a run of {timing['repeats']} repeats that kept no single tokens, so nothing says"
            " whether they are told apart."
        )
    ratios = {name: ratios_to(timing, name, default) for name in others}
    fastest = min(others, key=lambda name: median(ratios[name]))
    best, size = ratios[fastest], timing["repeats"]
    where = _where(timing)
    if median(best) >= 1.0:
        return f"By time, {where}, none of the others is faster in the median of {size} repeats."
    faster = sum(ratio < 1.0 for ratio in best)
    told = "in all of them" if faster == size else f"in {faster} of {size}: not told apart"
    return (
        f"By time, {where}, `{fastest}` takes {median(best):.3f} of its time in the median of"
        f" {size} repeats, and is faster {told}."
    )


def _has_samples(timing: Result) -> bool:
    return all("samples_ms" in arm for arm in timing["arms"].values())


def ratios_to(timing: Result, name: str, base: str) -> list[float]:
    """By repeat: the median over tokens of an arm's time over another's for the same token."""
    arms = timing["arms"]
    pairs = zip(arms[name]["samples_ms"], arms[base]["samples_ms"], strict=True)
    return [median([a / b for a, b in zip(own, other, strict=True)]) for own, other in pairs]


def _where(timing: Result) -> str:
    cache = timing["expert_cache"]
    return "without a cache" if cache is None else f"with a cache of {cache}"


def _training(seen: Result, recall: Result) -> str:
    if seen["training_tokens"]:
        return (
            f"{seen['training_tokens']} tokens x {seen['epochs']} epochs,"
            f" {seen['training_s']:.0f} s"
        )
    if seen["default_vector_parameters"]:
        return f"means of {recall['tokens']} tokens"
    return "none"


def _cost(cost: Result, seen: Result, name: str) -> str:
    """Measured cost of all layers; a hybrid's is put together of its layers'."""
    us = {n: spread["p50"] for n, spread in cost["us_per_token"].items()}
    if name in us:
        return f"{us[name]:.0f} us"
    share = len(seen["network_layers"]) / cost["layers"]
    return f"{share * us['estimator'] + (1 - share) * us['default_vectors']:.0f} us (computed)"


def _tpot(timing: Result, name: str) -> str:
    spread = timing["arms"][name]["tpot_ms"]
    return f"{spread['p50']:.1f} ({spread['p20']:.1f} to {spread['p80']:.1f})"


def _layers(recall: Result) -> str:
    count = len(recall["predictors"][DEFAULT_PREDICTOR]["recall"])
    rows = [
        (f"`{name}`", *("-" if v is None else f"{v:.3f}" for v in seen["recall"]))
        for name, seen in recall["predictors"].items()
    ]
    table = markdown_table(("predictor", *(str(n) for n in range(count))), rows)
    chosen = recall["predictors"]["hybrid"]["network_layers"]
    return (
        "## Recall by layer\n\n" + table + "\n\n`hybrid` takes the estimator in layers"
        f" {', '.join(str(n) for n in chosen) or 'none'}, chosen on the same held-out text that its"
        " recall is measured on."
    )


def _traffic(timing: Result) -> str:
    rows = []
    for name, arm in timing["arms"].items():
        rows.append(
            (
                f"`{name}`",
                medians_text(arm["medians_ms"]),
                _to_default(timing, name),
                "-" if arm["recall"] is None else f"{100 * arm['recall']:.1f} %",
                f"{100 * arm['predicted_share']:.0f} %",
                *traffic_cells(arm["total"], timing["model"]["moe_layers"]),
            )
        )
    heads = ("arm", "ms/token of each run", f"x `{DEFAULT_PREDICTOR}`", "recall")
    table = markdown_table((*heads, "steps predicted", *TRAFFIC_HEAD), rows)
    different = timing["different_token_lists"]
    same = "the same in all runs" if different == 0 else f"**in {different + 1} versions**"
    off = "as by default" if timing["auto_off"] else "off, so that every step is predicted"
    return (
        f"## When used, {_where(timing)}, `auto_off` {off}\n\n"
        + table
        + f"\n\nThe widened reference model ({timing['model']['expert_bytes'] / 1e6:.0f} MB of"
        f" experts on disk), policy `exact`;"
        f" {timing['prompts']} prompts, {timing['new_tokens']} greedy tokens each,"
        f" {timing['repeats']} repeats, all arms in turns within one process, a prompt each, back"
        " and forth; the first tokens of each turn are left out."
        f" Tokens: {same}. ms/token is the median over all tokens (in the table above with the"
        f" 20th and 80th percentile); x `{DEFAULT_PREDICTOR}` is the median over tokens of a"
        " token's time over that of the same token in the same repeat: median, lowest and highest"
        " of the repeats."
    )


def _to_default(timing: Result, name: str) -> str:
    if not _has_samples(timing):
        return NOT_MEASURED
    ratios = ratios_to(timing, name, DEFAULT_PREDICTOR)
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


_NOTES = """## How to read this

- Every predictor is measured through the graph that the passes rewrite, node by node, by
  `specmoe calibrate --train-estimator`.
- `pre_attention` reads a later state than the others: the output of the layer before, experts
  included. So it also predicts the first layer, and its prefetch has only the attention to hide
  behind, where the others have the experts and the attention. It has no branch in the graph: in
  steps that are not predicted its network still runs.
- `previous_token` repeats experts that a cache which holds one token's experts still holds; with a
  cache it has nothing to fetch.
- The networks' inner width, loss and epochs were picked among about a dozen variants on windows of
  the held-out files, in two of the layers: their recall here is a little flattered by that.
- The widened model runs with the calibration of the model that it was widened from: widening
  preserves the function.
- Trained alike: `estimator` and `pre_attention` have the same loss, tokens, epochs and seed. The
  loss is the KL divergence from the router's weights of its top k; arXiv 2603.19289 distils the
  full distribution, arXiv 2511.10676 uses a loss that ranks. The layers of both networks are this
  project's. Neither paper's figures are reproduced here.
- Cost is the time that a compiled function of all layers but the first takes beyond one that does
  nothing, one token; `default_vectors` and `estimator` include the blend. The prefetch itself,
  the same for all, is not in it.
- `auto`, the default, is `hybrid` where a file holds trained networks, else `default_vectors`.
- Training time leaves out running the model over the text, which default vectors need as well.
- Not run on a GPU; one small model, and one body of text."""
