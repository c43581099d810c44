"""The page of `python -m benchmarks ranks_gpu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.kit.claims import Claim
from specmoe_compile.cli.tables import markdown_table

CONTEXTS = (1024, 65536)
CELL_ARMS = ("cache_25", "cache_50", "resident")
WAYS = ("all_reduce", "one_shot")
"""How ranks add up: option `sums` of the backend."""
HEAD = (
    "shape",
    "context",
    "slots",
    "sums by",
    "1 rank, ms",
    "ranks, ms",
    "ratio",
    "GPU, ms",
    "sums, ms",
    "hits",
    "lease",
)


def gpu_page(name: str, result: Mapping[str, Any], found: Sequence[Claim]) -> str:
    """The document of one result; `found` are its claims."""
    ranks, rows, machine = result["ranks"], result["rows"], result["machine"]
    versions = result["versions"]
    shapes = list(dict.fromkeys(key.split("|")[0] for key in rows if "wall_ms" in rows[key]))
    body, missing = [], []
    for shape, context, arm in product(shapes, CONTEXTS, CELL_ARMS):
        case = f"{shape}|{context}|turn 1|{arm}"
        one = rows.get(f"{case}|1 ranks")
        ways = {sums: rows.get(f"{case}|{ranks_key(ranks, sums)}") for sums in WAYS}
        there = {sums: several for sums, several in ways.items() if several is not None}
        if one is None or not there:
            missing.append(f"{shape} {_slots(arm)} at {context}")
        if one is not None and not there:
            there = {WAYS[0]: None}
        body += [_row((shape, str(context), _slots(arm)), *way, one) for way in there.items()]
    link = rows[f"link|{ranks} ranks"]
    lines = [
        f"# {ranks} ranks on {ranks} GPUs",
        "",
        f"Experts of a model split over {ranks} {machine['gpu']['name']}s of one host, beside one"
        " of them: random weights in the full shape, routing of a recorded trace, batch 1, experts"
        " page-locked in RAM, policy `exact`, CUDA graphs, no prefetch. Slots are a share of all"
        " experts, and the same on every rank: where one has half, two have all. Wall time per"
        " token of `generate`, 95 tokens after 80, median (p20 to p80); one rank and"
        f" {ranks} after each other, in the lease that is given. torch {versions['torch']},"
        f" transformers {versions['transformers']}.",
        "",
        *markdown_table(HEAD, body).splitlines(),
        "",
        "*GPU* is the time that at least one kernel covers on the first rank, of a run of 12 tokens"
        " under the profiler; *sums* is the part that adds up over the ranks, with the wait for the"
        " other rank. One graph launch and one wait per token, for a token whose successor is"
        " launched already; no stream or device is synchronised.",
        "",
        *(f"- {c.text}: {c.measured}. {'Holds' if c.holds else 'Fails'}." for c in found),
        f"- Both links at once bring {' and '.join(f'{rate:.1f}' for rate in link['gbps'])} GB/s,"
        f" one alone {rows['link|1 ranks']['gbps'][0]:.1f}. A sum by itself takes"
        f" {link['all_reduce_us']:.0f} us with its launch, inside a graph {_sum_us(rows):.1f}.",
        *_in_graphs(rows.get(f"sums|{ranks} ranks")),
        *(f"- {note}" for note in result.get("notes", ())),
        "",
        *([f"Not measured: {'; '.join(missing)}.", ""] if missing else []),
        f"`python -m benchmarks ranks_gpu` measures ([data](../../benchmarks/results/{name})).",
        "",
    ]
    return "\n".join(lines)


def ranks_key(ranks: int, sums: str) -> str:
    """The end of a row's key; rows of all-reduces are as those of one rank."""
    return f"{ranks} ranks" + ("" if sums == "all_reduce" else f" {sums}")


def _in_graphs(row: Any) -> list[str]:
    """What each way of sums takes by itself, many in one graph."""
    if row is None:
        return []
    words = {"all_reduce": "NCCL", "one_shot": "one shot", "torch_one_shot": "PyTorch's one shot"}
    told = [
        f"{words[kind]} {' and '.join(f'{us:.1f}' for us in by_tokens.values())} us"
        for kind, by_tokens in row["us"].items()
        if all(isinstance(us, float) for us in by_tokens.values())
    ]
    return [
        f"- One of {row['sums']} sums in a CUDA graph, of {' and '.join(row['us']['all_reduce'])}"
        f" tokens of {row['hidden']}: {', '.join(told)}."
    ]


def _sum_us(rows: Mapping[str, Any]) -> float:
    """The shortest median of NCCL's kernel: the other ranks are there already."""
    kernels = [kernel for row in rows.values() for kernel in row.get("kernels", ())]
    us: list[float] = [k["us_each"] for k in kernels if "nccl" in k["kernel"].lower()]
    return min(us)


def _slots(arm: str) -> str:
    return {"cache_25": "25 %", "cache_50": "50 %", "resident": "all"}[arm]


def _row(of: tuple[str, str, str], sums: str, several: Any, one: Any) -> tuple[str, ...]:
    """A row of the table: what it is of, how ranks add up, and rows of several ranks and one."""
    both = [row for row in (one, several) if row is not None]
    ratio = several["wall_ms"]["p50"] / one["wall_ms"]["p50"] if len(both) == 2 else None
    return (
        *of,
        {"all_reduce": "NCCL", "one_shot": "one shot"}[sums],
        _wall(one),
        _wall(several),
        "-" if ratio is None else f"{ratio:.3f}",
        " and ".join(f"{row['device_ms']:.2f}" for row in both),
        "-" if several is None else f"{several['sums_ms_per_token']:.2f}",
        " and ".join(f"{100 * row['hit_rate']:.1f} %" for row in both),
        " and ".join(dict.fromkeys(str(row["lease"]) for row in both)),
    )


def _wall(row: Any) -> str:
    if row is None:
        return "-"
    wall = row["wall_ms"]
    return f"{wall['p50']:.2f} ({wall['p20']:.2f} to {wall['p80']:.2f})"
