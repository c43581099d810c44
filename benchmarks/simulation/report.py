"""Writes docs/results/predicted.md from the result of `benchmarks predicted_hardware`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specmoe_compile.cli.tables import markdown_table

TOLERANCE = 0.10

_HEAD = """# Other hardware: predicted, not measured

Written by `python -m benchmarks predicted_hardware` from
`benchmarks/results/predicted_hardware.json`.
**Every time on this page but the paper's two is a prediction.** No large model and none of these
GPUs was run for it. A recorded routing of the reference model, mapped onto the shapes of large
models, is replayed through the runtime's own cache and prefetch code ([replay](../replay.md)); only
link and computing are simulated.
"""

_MAPPING = """## The routing

`benchmarks/results/reference_trace.safetensors`: the reference model (8 layers, 32 experts, top-4)
decodes held-out Python source, every layer predicted from the one before by its own router on
default vectors that were learned on the way.

A target layer with E experts is E / 32 copies of a reference layer, each at another place of the
text; each copy gives the experts that weigh most, K x 32 / E of them. Target layer 0 is made of
layer 0, which is never predicted, the others of layers 1 to 7 in order. Predictions come from the
same places. Real models route differently: hit rates and recall below are those of this mapping.
"""

_READING = """## How to read this

- `on demand`: no cache. `prefetch`: no cache, the next layer's predicted experts are read during
  this one; what the true router wants is then read too (policy `exact`), so wrong guesses cost
  bytes. `cache N %`: slots for that share of all experts, policy `adaptive`. `-`: it does not fit
  beside the
  other weights and {reserved:.0f} GiB for context. All that is predicted is
  fetched: how many experts `auto_off` would choose on a GPU is not part of this.
- Where all experts fit (marked *), nobody would offload; the row is there for comparison.
- One sequence, median of {counted} steps after {warmup} of warm-up. Context length is not modelled.
- The experts are taken to lie in memory that the link can read at its full rate, page-locked. Host
  memory and its size are not modelled.
- The whole prediction scales with the link's efficiency: where experts are read for every token,
  10 % less bandwidth is nearly 10 % more time.
"""


def write_report(result: Mapping[str, Any], path: Path) -> bool:
    """Write the document; returns whether the paper's times are met within `TOLERANCE`."""
    holds = all(abs(row["ratio"] - 1) <= TOLERANCE for row in result["paper"])
    constants = result["assumptions"]
    parts = [
        _HEAD,
        _about(result),
        _paper(result["paper"], holds),
        _times(result),
        _MAPPING,
        _routing(result["rows"]),
        _assumptions(constants),
        _READING.format(
            reserved=constants["reserved_bytes"] / 2**30,
            counted=constants["steps"] - constants["warmup_steps"],
            warmup=constants["warmup_steps"],
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {path.name}: the paper's times are {'met' if holds else 'MISSED'}")
    return holds


def _about(result: Mapping[str, Any]) -> str:
    used = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v is not None)
    commit = result["note"] if result["commit"] is None else f"Commit: {result['commit'][:12]}."
    return f"{commit} Versions: {used}.\n"


def _paper(rows: Sequence[Mapping[str, Any]], holds: bool) -> str:
    table = markdown_table(
        ("Qwen3-30B-A3B, bf16, A6000", "paper, measured", "predicted", "ratio", "read per token"),
        [
            (
                row["name"],
                f"{row['paper_ms']:.1f} ms",
                f"{row['tpot_ms']:.1f} ms",
                f"{row['ratio']:.3f}",
                f"{_read_bytes(row) / 1e9:.2f} GB",
            )
            for row in rows
        ],
    )
    verdict = "Both are within 10 %." if holds else "**Not both are within 10 %.**"
    return (
        "## Against a measurement\n\n"
        f"{table}\n\n{verdict} The paper's prefetch commits to its predictions (policy `commit`),"
        " so that it reads the predicted experts and no others; no cache in either. The parameters"
        " are those of the tables at the end, none fitted to these numbers; the efficiency of PCIe"
        " decides most: at the 0.875 that was measured on an H200 instead of 0.8, both would come"
        " out about 8 % lower.\n"
    )


def _read_bytes(cell: Mapping[str, Any]) -> float:
    return float(cell["demand_bytes_per_token"] + cell["speculative_bytes_per_token"])


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["cells"]))


def _times(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    columns = _columns(rows)
    lines = []
    for row in rows:
        cells = row["cells"]
        times = [f"{cells[name]['tpot_ms']:.1f}" if name in cells else "-" for name in columns]
        star = " *" if row["fits"] else ""
        lines.append((row["model"], row["hardware"] + star, *times))
    return "## Time per token in ms: predicted, not measured\n\n" + (
        markdown_table(("model", "GPU", *columns), lines) + "\n"
    )


def _routing(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hit rates do not depend on the hardware without prefetch: the roomiest row has them all."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        cells = max(own, key=lambda row: len(row["cells"]))["cells"]
        hits = [
            f"{100 * cell['hit_rate']:.0f} % (Belady {100 * cell['belady_hit_rate']:.0f} %)"
            if (cell := cells.get(f"cache {share}")) is not None
            else "-"
            for share in ("10%", "25%", "50%")
        ]
        lines.append((model, f"{100 * cells['prefetch']['recall']:.0f} %", *hits))
    head = ("mapped onto", "recall", "hits at 10 %", "at 25 %", "at 50 %")
    return markdown_table(head, lines) + "\n"


def _assumptions(constants: Mapping[str, Any]) -> str:
    hardware = markdown_table(
        ("GPU", "link GB/s", "how", "memory GB/s, peak", "memory"),
        [
            (
                gpu["name"],
                f"{gpu['link_gbps']:.1f}",
                gpu["link_note"],
                str(gpu["memory_gbps"]),
                f"{gpu['memory_bytes'] / 1e9:.0f} GB",
            )
            for gpu in constants["hardware"]
        ],
    )
    models = markdown_table(
        ("model", "MoE layers x experts, top-K", "expert", "layer besides", "rest", "format"),
        [
            (
                model["name"],
                f"{model['layers']} x {model['experts']}, top-{model['top_k']}",
                f"{model['expert_bytes'] / 1e6:.2f} MB",
                f"{model['layer_bytes'] / 1e6:.1f} MB",
                f"{model['step_bytes'] / 1e9:.2f} GB",
                model["note"],
            )
            for model in constants["models"]
        ],
    )
    return (
        "## Assumptions\n\n"
        f"- Links: raw rate x {constants['pcie_efficiency']}, unless measured;"
        f" {constants['readers']} copies at once share it. No latency per copy.\n"
        f"- Computing: bytes of weights over peak memory bandwidth x"
        f" {constants['memory_efficiency']} (an expert kernel on an H200 reached 0.58), plus"
        f" {constants['layer_overhead_us']:.0f} us per layer: what four layers of Qwen3-30B-A3B in"
        " a CUDA graph on an H200 took beyond their bytes at that rate ([h200](log/h200.md)).\n"
        f"- A prediction of a layer takes {constants['prediction_us']:.0f} us: the difference of"
        " the reference model's graphs with and without it there.\n\n"
        f"{hardware}\n\n{models}\n"
    )
