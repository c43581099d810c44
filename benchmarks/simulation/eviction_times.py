"""The part of docs/results/eviction.md that was timed: results of `benchmarks eviction_time`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specmoe_compile.cli.tables import markdown_table

WHY = (
    "0.90 was asked with 25 % of the experts and 0.80 with 50 %; both hold. With 50 % and given"
    " text it was 0.87 ([data](../../benchmarks/results/eviction_time_given_counted.json)) while"
    " the next bypassed record overwrote the one before: LRU missed 33,660 experts, `adaptive`"
    " 23,739, and 20,184 since a record stays in its place until that is needed"
    " ([how](../runtime.md#session)). Both arms have as many slots; the ring that the others are"
    " read into has six records under LRU, whose steps of decode do not need it, and K more under"
    " `adaptive`.\n\nFaster reads would not do: a miss costs as much under both policies, and"
    " where it costs less the two are nearer to each other. By timers in the engine (two texts,"
    " `adaptive`, 50 %) a layer takes 0.4 ms without a miss, 1.6 with one, 2.9 with two and 4.2"
    " with three. The read of a record is 1.4 of the 1.6; the disk alone takes 1.2 to 1.4,"
    " in one part or in three, by one thread or by four."
)


def times_section(results: Sequence[Mapping[str, Any]]) -> str:
    """Tables of the runs, and of the plans' cost in the first of them."""
    first = results[0]
    machine = first["machine"]
    head = (
        "## Time on a CPU with experts on disk\n\nMeasured: `python -m benchmarks eviction_time`;"
        f" {machine['cpu']}, {machine['cores']} cores. The reference model with experts of"
        f" {first['model']['record_mib']:g} MiB in float32, no prefetch, arms in turns in one"
        " process; ms per token. All arms generated the same tokens."
    )
    plans = [
        (
            f"{row['experts']}, {row['slots']}, {row['top_k']}",
            row["policy"],
            f"{row['cpp_us']:.1f}",
            f"{row['python_us']:.1f}",
        )
        for row in first["plans"]
    ]
    return "\n\n".join(
        [
            head,
            *(_run(result) for result in results),
            WHY,
            "A plan of one layer alone, us, the call from Python in it:",
            markdown_table(("E, S, K", "policy", "in C++", "in Python"), plans) + "\n",
        ]
    )


def _run(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    if "texts" in settings:
        name = f"eviction_time_given{'' if '50%' in result['ratios'] else '_25'}.json"
        what = (
            f"**Given text** (`--given`): the first {settings['prompt'] + settings['new_tokens']}"
            f" tokens of each of the {len(settings['texts'])} texts below, {settings['new_tokens']}"
            " of them decoded"
        )
    else:
        name = "eviction_time.json"
        what = (
            f"**The model's own continuations** of {settings['prompts']} held-out prompts of 64"
            f" tokens, {settings['new_tokens']} new ones each"
        )
    ratios = ", ".join(
        f"{size} {ratio['mean']:.2f} (median of turns {ratio['median_of_turns']:.2f})"
        for size, ratio in result["ratios"].items()
    )
    arms = [
        (
            row["size"],
            row["policy"],
            f"{row['mean_ms']:.2f}",
            f"{row['tpot_ms']['p50']:.2f}",
            f"{row['tpot_ms']['p20']:.2f}..{row['tpot_ms']['p80']:.2f}",
            f"{100 * row['hit_rate']:.1f} %",
        )
        for row in result["arms"]
    ]
    return (
        f"{what} ([data](../../benchmarks/results/{name})). `adaptive` against LRU, mean time:"
        f" {ratios}.\n\n"
        + markdown_table(("cache", "policy", "mean", "median", "p20..p80", "hits"), arms)
        + _by_text(result)
    )


def _by_text(result: Mapping[str, Any]) -> str:
    """Ratios of each text, where its name is known."""
    names = result["settings"].get("texts")
    if names is None:
        return ""
    arms = {(row["size"], row["policy"]): row["mean_of_turns_ms"] for row in result["arms"]}
    rows = [
        (
            size,
            *(
                f"{adaptive / lru:.2f}"
                for adaptive, lru in zip(arms[size, "adaptive"], arms[size, "lru"], strict=True)
            ),
        )
        for size in result["ratios"]
    ]
    table = markdown_table(("cache", *names), rows)
    return f"\n\n`adaptive` against LRU by text, mean time:\n\n{table}"
