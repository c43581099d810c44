"""What each `quantize=` costs in output and saves in bytes, on the reference model.

python -m benchmarks formats measure [--json FILE] [--tokens N] [--prompts N] [--new-tokens N]
python -m benchmarks formats report [--json FILE] [--document FILE]

Loss, KL divergence and agreement are over held-out windows that are fed as a whole, beside the
unmodified model in float32; bytes are of tokens that are decoded one by one from disk with the same
number of cache slots in every form.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit.places import DOCUMENTS, RESULTS
from benchmarks.kit.plots import load_pyplot
from specmoe_compile.reference_model import CHECKPOINT_DIR

FORMS = (None, "int8", "fp8", "int4", "mxfp4")
MAX_INCREASE = {"int8": 0.001, "fp8": 0.003, "int4": 0.02}
"""Nats per byte that a form may lose."""

RESULT = RESULTS / "formats.json"
_TIMES = RESULTS / "formats_time.json"
_POLICIES = RESULT.with_name("speculation_eval.json")
DOCUMENT = DOCUMENTS / "formats.md"
WINDOW_TOKENS = 256
EXPERT_CACHE = "25%"


def measure(tokens: int, prompts: int, new_tokens: int, path: Path) -> None:
    """Measure every form; writes what it has after each."""
    import torch

    from benchmarks.end_to_end.run import held_out_prompts
    from benchmarks.reference_model.data import default_source, held_out_windows
    from benchmarks.reference_model.tokenizer import PAD_ID
    from specmoe_compile.bench.machine import provenance
    from specmoe_compile.bench.plain_model import load_plain

    windows = held_out_windows(default_source(), WINDOW_TOKENS - 1)
    windows = windows[(windows != PAD_ID).all(dim=1)]
    count = -(-tokens // (WINDOW_TOKENS - 1))
    windows = windows[torch.linspace(0, len(windows) - 1, count).round().long()]
    texts = torch.tensor(held_out_prompts(prompts))
    reference = load_plain(str(CHECKPOINT_DIR), "float32")
    expected = [_log_probabilities(reference, window) for window in windows]
    result: dict[str, Any] = {"schema": 1, **provenance(), "expert_cache": EXPERT_CACHE}
    result["forms"] = forms = []
    with tempfile.TemporaryDirectory(prefix="specmoe-formats-") as folder:
        for form in FORMS:
            forms.append(_measure_form(form, Path(folder), windows, expected, texts, new_tokens))
            print(forms[-1], flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _measure_form(
    form: str | None, folder: Path, windows: Any, expected: Sequence[Any], texts: Any, new: int
) -> dict[str, Any]:
    """Loss and divergence over `windows`, [N, W] int64; bytes over `new` tokens of each text."""
    import specmoe_compile
    from specmoe_compile.api import reset_stats

    model: Any = specmoe_compile.from_pretrained(
        CHECKPOINT_DIR,
        device="cpu",
        dtype="float32",
        quantize=form,
        store="disk",
        store_dir=folder / str(form),
        expert_cache=EXPERT_CACHE,
        progress=False,
    )
    loss = reference_loss = divergence = 0.0
    same = tokens = 0
    for window, wanted in zip(windows, expected, strict=True):
        got = _log_probabilities(model, window)
        targets = window[1:, None]
        loss -= float(got.gather(1, targets).sum())
        reference_loss -= float(wanted.gather(1, targets).sum())
        divergence += float((wanted.exp() * (wanted - got)).sum())
        same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
        tokens += len(targets)
    counted = []
    for count in (new + 1, 1, new + 1):  # the first fills the cache
        reset_stats(model)
        for text in texts:
            model.generate(text[None], max_new_tokens=count, do_sample=False)
        counted.append(specmoe_compile.stats(model).total.demand_bytes)
    stats = specmoe_compile.stats(model)
    read = counted[2] - counted[1]  # without the prompts
    found = {
        "quantize": form,
        "experts": stats.experts,
        "tokens": tokens,
        "loss_nats": loss / tokens,
        "loss_increase_nats": (loss - reference_loss) / tokens,
        "kl_nats": divergence / tokens,
        "top1_agreement": same / tokens,
        "decoded_tokens": new * len(texts),
        "bytes_per_token": read / (new * len(texts)),
        "record_bytes": stats.record_bytes,
        "store_bytes": stats.store_bytes,
    }
    specmoe_compile.close(model)
    return found


def _log_probabilities(model: Any, window: Any) -> Any:
    """Of each next token of a window, [W] int64 -> [W - 1, V] float64."""
    import torch

    with torch.no_grad():
        return model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)


def report(result: dict[str, Any], document: Path) -> None:
    """Write the document and its plot.

    Raises:
        ValueError: a form loses more than it may.
    """
    from specmoe_compile.cli.tables import markdown_table
    from specmoe_compile.system.sizes import format_bytes

    for form in result["forms"]:
        limit = MAX_INCREASE.get(form["quantize"])
        if limit is not None and form["loss_increase_nats"] > limit:
            raise ValueError(
                f"{form['quantize']} loses {form['loss_increase_nats']:.4f} nats per byte, more"
                f" than {limit}: the scales are searched badly, or the model changed."
            )
    first = result["forms"][0]
    rows = [
        (
            form["experts"],
            f"{form['loss_nats']:.4f}",
            f"{form['loss_increase_nats']:+.4f}",
            f"{max(0.0, form['kl_nats']):.5f}",
            f"{100 * form['top1_agreement']:.2f} %",
            format_bytes(round(form["bytes_per_token"])),
            f"{100 * form['store_bytes'] / first['store_bytes']:.1f} %",
        )
        for form in result["forms"]
    ]
    head = ("experts", "loss", "increase", "KL", "top-1 same", "read/token", "store")
    plot = document.with_name("formats.png")
    policies = json.loads(_POLICIES.read_text(encoding="utf-8")) if _POLICIES.exists() else {}
    _draw(result["forms"], policies, plot)
    document.write_text(
        _TEXT.format(
            tokens=first["tokens"],
            cache=result["expert_cache"],
            table=markdown_table(head, rows),
            plot=plot.name,
            times=_times(json.loads(_TIMES.read_text(encoding="utf-8"))) if _TIMES.exists() else "",
        ),
        encoding="utf-8",
    )


def _times(result: dict[str, Any]) -> str:
    """The part of the document that is about time."""
    from specmoe_compile.cli.tables import markdown_table
    from specmoe_compile.system.sizes import format_bytes

    rows = [
        (
            form["experts"],
            format_bytes(form["record_bytes"]),
            f"{form['mean_ms']:.2f}",
            f"{form['tpot_ms']['p50']:.2f}",
            f"{100 * form['hit_rate']:.1f} %",
            f"{form['ratio']:.2f}",
        )
        for form in result["forms"]
    ]
    head = ("experts", "one", "ms/token, mean", "median", "hits", "of float32")
    machine = result["machine"]
    return (
        "\n## Time on a CPU with experts on disk\n\nThe reference model with experts of 3 MiB in"
        f" float32, {machine['cpu']}, {machine['cores']} cores; the same slots (25 %) in every"
        " form, no prefetch, forms in turns in one process. Made by `python -m benchmarks"
        f" formats_time`; data: `benchmarks/results/formats_time.json`.\n\n"
        f"{markdown_table(head, rows)}\n"
    )


_TEXT = """# Number formats: loss, bytes, tokens

The reference model (8 layers, 32 experts of which 4 run, a byte vocabulary), activations in
float32, experts on disk, expert cache {cache} of all experts, which is the same number of slots in
every form. Loss and KL divergence in nats per byte, against the unmodified model, over {tokens}
held-out tokens; bytes per token of greedy decoding, policy `exact`.

{table}

![loss against bytes read per token]({plot})

The squares are the approximate policies on float32 records ([fidelity](fidelity.md)).

A record of this model holds 24,576 weights and is padded to 4096 bytes, so that its stores are
larger than the formats: int4 is 14.1 % of float32, and 16.7 % with padding. Experts of real models
are a hundred times larger: their padding is below 0.1 % in every format.
{times}

`quantize=` is described in [formats](../formats.md). Made by `python -m benchmarks formats`; data:
`benchmarks/results/formats.json`.
"""


def _draw(forms: Sequence[dict[str, Any]], policies: dict[str, Any], path: Path) -> None:
    """Increase in loss against bytes read per token: formats, and policies on float32 records."""
    pyplot = load_pyplot()

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    lossy = [p for p in policies.get("policies", ()) if p["policy"] != "exact"]
    shown = [p for p in lossy if not p["skip_layers"]]
    for label, marker, points in (
        ("quantize=, policy exact", "o", [f for f in forms if f["quantize"] is not None]),
        ("float32, approximate policies", "s", shown),
    ):
        axes.plot(
            [point["bytes_per_token"] / 1024 for point in points],
            [max(point["loss_increase_nats"], 1e-5) for point in points],
            marker,
            label=label,
        )
        for point in points:
            axes.annotate(
                point.get("quantize") or point.get("name"),
                (point["bytes_per_token"] / 1024, max(point["loss_increase_nats"], 1e-5)),
                fontsize=6,
                xytext=(4, 3),
                textcoords="offset points",
            )
    axes.axvline(forms[0]["bytes_per_token"] / 1024, color="grey", label="float32, exact")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("KiB read per token")
    axes.set_ylabel("increase in loss, nats per byte (at least 1e-5)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks formats",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("phase", choices=("measure", "report"))
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args(argv)
    if arguments.phase == "measure":
        measure(arguments.tokens, arguments.prompts, arguments.new_tokens, arguments.json)
    else:
        report(json.loads(arguments.json.read_text(encoding="utf-8")), arguments.document)
    return 0
