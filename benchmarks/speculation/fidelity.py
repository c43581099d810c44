"""What policies and lists of skipped layers cost in output, on the held-out files: `specmoe eval`.

Shape letters: N windows, W tokens per window, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.run import EXPERT_CACHE, held_out_prompts
from benchmarks.kit.plots import load_pyplot
from benchmarks.reference_model.data import default_source, held_out_windows
from benchmarks.reference_model.tokenizer import PAD_ID
from specmoe_compile.cli.evaluate import measure
from specmoe_compile.cli.fidelity_report import HEAD, as_markdown, draw_layers, policy_rows
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.system.sizes import format_bytes

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Of policy default_vector; the weights of a token's four experts sum to 1."""
POLICIES = (
    "exact",
    *(f"default_vector={threshold:g}" for threshold in THRESHOLDS),
    "commit",
    "commit=true",
)
SKIPS = ("none", "auto", "0,1")
WINDOW_TOKENS = 256
CONTEXT_TOKENS = 64
LOSS_TOKENS = 4096


def run_eval(
    model: Path,
    store_dir: Path,
    *,
    prompts: int,
    new_tokens: int,
    loss_tokens: int,
    skips: Sequence[str],
    on_policy: Callable[[dict[str, Any]], None],
) -> None:
    """Measure policies with lists of skipped layers.

    The widened model computes the same function as the one that was trained and routes the same,
    but for rounding, and takes ten times as long.

    Args:
        model: checkpoint folder. store_dir: its expert store, made when it is not there.
        prompts: to continue greedily, of the held-out files. new_tokens: per prompt.
        loss_tokens: held-out tokens that are fed one by one.
        skips: lists of skipped layers, see `specmoe eval --skip`.
        on_policy: gets all that is measured so far, after each policy.
    """
    import torch

    found = held_out_windows(default_source(), WINDOW_TOKENS - 1)
    found = found[(found != PAD_ID).all(dim=1)]
    count = -(-loss_tokens // (WINDOW_TOKENS - 1 - CONTEXT_TOKENS))
    picks = torch.linspace(0, len(found) - 1, count).round().long()
    measure(
        str(model),
        POLICIES,
        skips,
        {"windows": found[picks], "prompts": torch.tensor(held_out_prompts(prompts))},
        {"context": CONTEXT_TOKENS, "new_tokens": new_tokens},
        {"dtype": "float32", "store_dir": store_dir, "expert_cache": EXPERT_CACHE},
        {},
        "plain",
        on_policy=on_policy,
    )


def write_fidelity(found: dict[str, Any], wide: dict[str, Any] | None, path: Path) -> None:
    """Write the document and, beside it, the drawings of layers and of the curve.

    Args:
        found: result of the model as trained. wide: of the widened one, if it was measured.
        path: the document.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    layers, curve = path.with_name("fidelity_layers.png"), path.with_name("fidelity_curve.png")
    draw_layers(found["layers"], layers)
    draw_curve(found["policies"], curve)
    text = as_markdown({**found, "model": "The reference model as trained"}, layers)
    text += f"\n![bytes and loss of the policies]({curve.name})\n\n"
    if wide is not None:
        text += _wide_section(wide) + "\n\n"
    commits = sorted({str(result["commit"])[:12] for result in (found, wide) if result is not None})
    path.write_text(text + _NOTES + f"\nCommit: {', '.join(commits)}.\n", encoding="utf-8")


def _wide_section(wide: dict[str, Any]) -> str:
    size = format_bytes(wide["model"]["bytes_per_expert"])
    sizes = wide["sizes"]
    return (
        f"## The widened model, experts of {size}\n\n"
        + markdown_table(HEAD, policy_rows(wide["policies"]))
        + f"\n\n{wide['policies'][0]['tokens']} held-out tokens fed one by one; greedy agreement of"
        f" {sizes['prompts'][0]} prompts x {sizes['new_tokens']} tokens."
    )


def draw_curve(policies: list[dict[str, Any]], path: Path) -> None:
    """Draw bytes read per token against the increase in loss, a line per list of skipped layers."""
    pyplot = load_pyplot()

    exact = next(row for row in policies if row["policy"] == "exact")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in policies:
        if row["policy"] == "exact":
            continue
        kind = row["policy"] + (f" {row['commit_weights']}" if row["commit_weights"] else "")
        skipped = ",".join(map(str, row["skip_layers"])) or "none"
        lines.setdefault(f"{kind}, skip {skipped}", []).append(row)
    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for label, rows in lines.items():
        if rows[0]["policy"] == "default_vector":
            rows = [exact, *rows]
        fewer = [100 * (1 - row["bytes_per_token"] / exact["bytes_per_token"]) for row in rows]
        axes.plot(fewer, [row["loss_increase_nats"] for row in rows], marker="o", label=label)
    axes.set(xlabel="fewer bytes than exact, %", ylabel="increase in loss, nats/byte")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


_NOTES = """## How to read this

- A token is a byte of Python source here, so nats per token are nats per byte.
- `default_vector T`: a miss whose router weight is below T gets its default vector. Weights of a
  token's four experts sum to 1, so nearly every fourth expert is below 0.25.
- `skip` lists layers that never speculate; they are exact. Where `auto` skips what another list
  does, one row stands for both.
- `auto_off` is off, so that every layer of every step is under the policy: it would turn policies
  off together with prefetches that do not pay.
- The widened model of the other benchmarks computes the same function with experts 32 times as
  large. Its shares of bytes differ a little, since a wrong guess that has not started to be read is
  taken back, and large records take longer.
- Bytes count what was read for the step and ahead of it, with a cache of 25 % of the experts.
- A greedy continuation that differs once differs from there on in most tokens, since the text that
  follows is another one; loss and KL divergence are over the same text for all.

Written by `python -m benchmarks speculation` from `benchmarks/results/speculation_eval*.json`.
"""
