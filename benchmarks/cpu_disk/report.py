"""Writes docs/results/log/cpu-disk.md and its plots from the result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu_disk.figures import (
    GOAL,
    TIMED,
    Record,
    cells_of,
    drift,
    figures,
    read_results,
    recall_by_layer,
    sort_key,
)
from benchmarks.cpu_disk.notes import NOTES, PEER_REASONS
from benchmarks.cpu_disk.plots import draw_all
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.cli.fidelity_report import HEAD as POLICY_HEAD
from specmoe_compile.cli.fidelity_report import policy_rows
from specmoe_compile.cli.tables import markdown_table
from specmoe_compile.system.sizes import format_bytes

Found = Mapping[str, Record]


def write_report(results: Path, report: Path) -> None:
    """Write the document and the plots beside it.

    Raises:
        FileNotFoundError: there is no result at all.
    """
    found = read_results(results)
    report.parent.mkdir(parents=True, exist_ok=True)
    plots = draw_all(found, report)
    parts = [
        _head(found),
        _by_size_section(found),
        plots.get("tpot"),
        _uncapped_section(found),
        _winners_section(found),
        _split_section(found),
        plots.get("split"),
        _limit_section(found),
        plots.get("limit"),
        _recall_section(found),
        plots.get("recall"),
        _loss_section(found),
        plots.get("loss"),
        _drift_section(found),
        NOTES,
    ]
    report.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _head(found: Found) -> str:
    first = next(found[name] for name in TIMED if name in found)
    model, machine, settings = first["model"], first["machine"], first["settings"]
    versions = ", ".join(f"{name} {v}" for name, v in first["versions"].items() if v)
    commits = ", ".join(dict.fromkeys(str(result["commit"])[:12] for result in found.values()))
    loads = ", ".join(f"{name} {result['load_average'][0]:.1f}" for name, result in found.items())
    minutes = sum(result["wall_s"] for result in found.values()) / 60
    dry = "**A dry run: the figures mean nothing.**\n\n" if settings["dry"] else ""
    return (
        "# CPU with experts on disk: against the peers, and against the limit\n\n"
        + dry
        + "Written by `make bench` (`python -m benchmarks cpu_disk`) from"
        " `benchmarks/results/cpu_disk_*.json`.\n\n"
        f"- Model: {model['name']}: {model['moe_layers']} MoE layers, {max(model['experts'])}"
        f" experts, top-{model['top_k']}, {format_bytes(model['bytes_per_expert'])} each,"
        f" {model['expert_bytes'] / 1e6:.0f} MB in all, {model['dtype']}.\n"
        f"- Machine: {machine['cpu']}, {machine['cores']} cores,"
        f" {machine['ram_bytes'] / 2**30:.1f} GiB RAM, {machine['system']}, GPU:"
        f" {'none' if machine['gpu'] is None else machine['gpu']['name']}.\n"
        f"- Versions: {versions}.\n"
        f"- Commit: {commits}. Load average at the end of each phase: {loads}."
        f" All phases together took {minutes:.0f} minutes.\n"
        f"- {settings['prompts']} prompts of {settings['prompt_tokens']} tokens, greedy,"
        f" {settings['new_tokens']} tokens each, {settings['slow_tokens']} where a table has a *;"
        f" {settings['passes']} passes there and back, one run at a time; ms/token is the median,"
        " in brackets p20 and p80.\n"
        f"- {_processes(found)}"
    )


def _processes(found: Found) -> str:
    """Which cells kept a process for all their turns, and whether those that waited were idle."""
    cells = [cell for cell, _ in cells_of(found, *TIMED)]
    kept = list(dict.fromkeys(cell["arm"] for cell in cells if cell["kept_alive"]))
    own = list(dict.fromkeys(cell["arm"] for cell in cells if not cell["kept_alive"]))
    if not kept:
        return "Every run has a process of its own."
    idle = max(found[name]["idle_cores"] for name in TIMED if name in found)
    text = (
        "A process that stays alive for all turns of a cell, each turn after a warm-up:"
        f" {_and(kept)}. What the turn before left in the expert cache, and what it taught the"
        " choice of predictions, stays. Those that waited used"
        f" at most {idle:.2f} cores, all together, while another was measured."
    )
    return text if not own else text + f" A process for each run: {_and(own)}."


def _and(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _by_size_section(found: Found) -> str:
    cells = {(c["arm"], c["size"]): c for c, _ in cells_of(found, "tight", "roomy") if c["size"]}
    refused = found.get("tight", {}).get("refused", {})
    sizes = sorted({*refused, *(size for _, size in cells)}, key=sort_key)
    caps = {size: c["memory_cap_bytes"] for (_, size), c in cells.items()}
    arms = [arm for arm in ARMS if any(arm == name for name, _ in cells)]
    rows = []
    for arm in arms:
        row = [arm]
        for size in sizes:
            if (arm, size) in cells:
                row.append(_times(cells[arm, size]))
            elif size in refused and arm in ("cache", "specmoe"):
                row.append("refused")
            else:
                row.append("-")
        rows.append(row)
    row = ["memory cap"]
    row += ["-" if not caps.get(size) else format_bytes(caps[size]) for size in sizes]
    lines = [
        "## Time per token by cache size, memory capped",
        "",
        "Each column has one limit for all arms, enforced by a control group, page cache included:"
        f" {format_bytes(_base_cap(found))} for the program and the model's other weights, and the"
        " size of the cache.",
        "",
        markdown_table(["ms/token", *sizes], [row, *rows]),
        "",
        *_first_tokens(found),
    ]
    if not any(caps.values()):
        lines += ["**No cap could be set on this machine: the figures are without one.**", ""]
    lines += [f"A cache of {size}: {reason}" for size, reason in refused.items()]
    model = next(iter(found.values()))["model"]
    if refused:
        lines += [
            "",
            f"One token needs {model['top_k']} of {min(model['experts'])} experts in each layer,"
            " and a cache that does not hold them never hits. The smallest legal cache has the"
            " column after the refused ones; the peers, whose cache is the page cache, run there"
            " too.",
        ]
    return "\n".join([*lines, *_failed(found, "tight", "roomy")])


def _base_cap(found: Found) -> int:
    return int(_settings(found)["base_cap_bytes"])


def _times(cell: Record, key: str = "tpot_ms") -> str:
    tpot = cell[key]
    text = f"{tpot['p50']:.1f} ({tpot['p20']:.1f}..{tpot['p80']:.1f})"
    return text + ("*" if cell["short"] and key == "tpot_ms" else "")


def _first_tokens(found: Found) -> list[str]:
    """specmoe over the tokens that a short cell of the same size has."""
    cells = [cell for cell, _ in cells_of(found, "tight", "roomy") if cell["memory_cap_bytes"]]
    sizes = {cell["size"] for cell in cells if cell["short"]}
    ours = [
        f"{cell['arm']} {cell['size']} {_times(cell, 'first_tpot_ms')}"
        for cell in cells
        if cell["size"] in sizes and cell["arm"] in ("on_demand", "cache", "specmoe")
    ]
    if not sizes:
        return []
    count = _settings(found)["slow_tokens"]
    text = f"`*`: the first {count} tokens of each prompt only."
    return [text + (f" Over the same tokens: {'; '.join(ours)}." if ours else ""), ""]


def _settings(found: Found) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = next(found[n]["settings"] for n in TIMED if n in found)
    return settings


def _failed(found: Found, *phases: str) -> list[str]:
    lines = [
        f"- {name} did not run: {why}"
        for phase in phases
        for name, why in found.get(phase, {}).get("failed", {}).items()
    ]
    return ["", *lines] if lines else []


def _uncapped_section(found: Found) -> str:
    if "uncapped" not in found:
        return ""
    phase = found["uncapped"]
    eager = next((c for c in phase["cells"] if c["arm"] == "eager"), None)
    rows = []
    for cell in phase["cells"]:
        own = figures(cell, phase)
        rows.append(
            (
                cell["name"],
                _times(cell),
                f"{cell['ttft_ms']:.0f} ms",
                _percent(cell["hit_rate"]),
                _bytes(own.read_bytes),
                format_bytes(cell["peak_rss_bytes"]),
                _same_tokens(cell, eager),
            )
        )
    head = ("arm", "ms/token", "first token", "hits", "read/token", "peak RSS", "tokens")
    lines = [
        "## Without a memory cap",
        "",
        markdown_table(head, rows),
        "",
        "`specmoe` reads its store past the page cache with and without a cap; the peers have the"
        " whole model in the page cache here (*: fewer tokens). Tokens are compared with the"
        " unmodified model's; `default_vector` and `commit` approximate.",
    ]
    return "\n".join([*lines, *_failed(found, "uncapped")])


def _same_tokens(cell: Record, eager: Record | None) -> str:
    if eager is None:
        return "-"
    if cell is eager:
        return "reference"
    for key in ("tokens_sha256", "first_tokens_sha256"):
        if cell[key] is not None and cell[key] == eager[key]:
            return "same" if key == "tokens_sha256" else "same as far as compared"
    return "differ"


def _winners_section(found: Found) -> str:
    """Where a peer is faster than specmoe under the same limit, and why."""
    rows = []
    for cell, phase in cells_of(found, *TIMED):
        if cell["arm"] not in PEER_REASONS:
            continue
        rivals = [
            c
            for c in phase["cells"]
            if c["arm"] in ("cache", "specmoe", "resident")
            and (c["size"] == cell["size"] if cell["memory_cap_bytes"] else True)
            and (c["memory_cap_bytes"] == cell["memory_cap_bytes"])
        ]
        if not rivals:
            continue
        # Of the same tokens, where the peer stopped early.
        key = "first_tpot_ms" if cell["short"] else "tpot_ms"
        best, ours, theirs = _best(rivals, cell, key)
        if theirs < ours:
            rows.append(
                (
                    cell["name"],
                    f"{theirs:.1f} ms",
                    f"{best['name']}: {ours:.1f} ms",
                    PEER_REASONS[cell["arm"]],
                )
            )
    if not rows:
        return "## Where a peer wins\n\nNowhere in this run, at the same limit of memory."
    return "## Where a peer wins\n\n" + markdown_table(
        ("peer", "it takes", "the best of specmoe there", "a likely reason, not measured"), rows
    )


def _best(rivals: Sequence[Record], cell: Record, key: str) -> tuple[Record, float, float]:
    """The fastest of the rivals; its median and the cell's, in ms."""
    best = min(rivals, key=lambda rival: rival[key]["p50"])
    return best, best[key]["p50"], cell[key]["p50"]


def _split_section(found: Found) -> str:
    rows = []
    for cell, phase in cells_of(found, *TIMED):
        own = figures(cell, phase)
        if own.stall_ms is None or own.overhead_ms is None:
            continue
        rows.append(
            (
                cell["name"],
                f"{own.mean_ms:.1f}",
                f"{own.compute_ms:.1f}",
                f"{own.stall_ms:.1f}",
                f"{own.overhead_ms:.1f}",
                _percent(own.hit_rate),
                _bytes(own.missed_bytes),
                _bytes(own.read_bytes),
            )
        )
    head = ("arm", "mean ms/token", "compute", "demand stall", "overhead", "hits", "missed/token")
    return (
        "## Where the time goes\n\n"
        + markdown_table((*head, "read/token"), rows)
        + "\n\nCompute is the time of `resident` in the same phase; stall is counted while there"
        " was nothing to compute; overhead is the rest: issuing and finishing reads on the cores"
        " that compute, the lookahead, records that push each other out of the processor's cache."
        " Missed is what was needed and not there; read has wrong guesses too."
    )


def _limit_section(found: Found) -> str:
    rows = []
    for cell, phase in cells_of(found, *TIMED):
        own = figures(cell, phase)
        low, high = own.distance_range
        goal = "-"
        if cell["arm"] == "specmoe":
            goal = "yes" if own.distance <= GOAL else "**no**"
        rows.append(
            (
                cell["name"],
                f"{own.mean_ms:.1f}" + ("*" if cell["short"] else ""),
                _bytes(own.missed_bytes),
                f"{own.link_gbps:.2f}",
                f"{own.limit_ms:.1f}",
                f"**{own.distance:.2f}** ({low:.2f}..{high:.2f})",
                goal,
            )
        )
    head = ("arm", "mean ms/token", "missed/token", "disk GB/s", "limit ms", "distance")
    return (
        "## Distance from the limit\n\n"
        "The limit is max(bytes missed / the disk's bandwidth, compute with everything resident):"
        " no arm that misses as much can be faster, unless the disk is faster under it than in the"
        " measurement around it.\n\n"
        + markdown_table((*head, f"at most {GOAL:.2f}"), rows)
        + "\n\nThe bandwidth is what random reads of whole records of the store give, four in"
        " flight, before and after each run. Bytes missed of an arm without specmoe are what the"
        " kernel read from the disk for its process; from the page cache it reads nothing. With a"
        " *: of the first tokens only."
    )


def _recall_section(found: Found) -> str:
    recall = recall_by_layer(found)
    if not recall:
        return ""
    head = ["MoE layer", *map(str, range(len(recall)))]
    row = ["recall", *("-" if r is None else f"{100 * r:.1f} %" for r in recall)]
    return (
        "## Recall per layer\n\n"
        + markdown_table(head, [row])
        + "\n\nShare of a layer's experts that the layer before predicted, in generated text, with"
        " every step predicted (`auto_off=False`). The first layer has none before it."
    )


def _loss_section(found: Found) -> str:
    if "loss" not in found:
        return ""
    loss = found["loss"]
    return (
        "## Loss against bytes, approximate policies\n\n"
        + markdown_table(POLICY_HEAD, policy_rows(loss["policies"]))
        + f"\n\n{loss['policies'][0]['tokens']} held-out tokens fed one by one, nats per byte,"
        f" against the {loss['reference']}; expert cache {loss['expert_cache']}, every step"
        " predicted."
    )


def _drift_section(found: Found) -> str:
    rows = []
    for name in TIMED:
        if name in found:
            watch, factor = found[name]["sentinel"], drift(found[name])
            medians = ", ".join("-" if ms is None else f"{ms:.1f}" for ms in watch["medians_ms"])
            row = (name, watch["cell"], medians, "-" if factor is None else f"{factor:.2f}")
            rows.append(row)
    head = ("phase", "sentinel", "ms/token at start, middle, end", "slowest over fastest")
    return "## Drift of the machine\n\n" + markdown_table(head, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _bytes(size_bytes: float | None) -> str:
    return "-" if size_bytes is None else format_bytes(round(size_bytes))
