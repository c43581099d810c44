"""The report of the full-size benchmark: derived figures, claims judged by them, tables.

A claim is yes or no where the rows that it needs were measured, else "not measured"; nothing is
judged by rows of a dry run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

CARDS_GBPS = {"RTX 4090, PCIe 4.0 x16 at 25 GB/s": 25.0, "RTX 3090, PCIe 3.0 x16 at 12 GB/s": 12.0}
DISTANCE_GOAL = 1.05
_CACHES = ("10", "25", "50")


@dataclass(frozen=True, slots=True)
class Claim:
    """One goal, what was found, and whether it holds; None: not measured."""

    text: str
    found: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "no", None: "not measured"}[self.holds]


def row_key(model: str, row: Row) -> str:
    """Names a row."""
    return "|".join(
        str(part) for part in (model, row["context"], row["routing"], row["arm"], row["mode"])
    )


class Results:
    """Rows of one model in a result file, and what follows from them."""

    def __init__(self, data: Mapping[str, Any], model: str) -> None:
        self.model = model
        self.dry = bool(data["dry"])
        self.about: Mapping[str, Any] = data["models"][model]
        self._rows = {k: r for k, r in data["rows"].items() if k.startswith(f"{model}|")}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def row(self, arm: str, mode: str, context: int, routing: str = "trace") -> Row | None:
        """A measured row; None if there is none, or it says why it was not run."""
        wanted = {"arm": arm, "mode": mode, "context": context, "routing": routing}
        row = self._rows.get(row_key(self.model, wanted))
        return row if row is not None and "tpot_ms" in row else None

    def p50(self, *place: Any) -> float | None:
        row = self.row(*place)
        return None if row is None else float(row["tpot_ms"]["p50"])

    def fastest(self, arm: str, mode: str, context: int, routing: str = "trace") -> Row | None:
        """The fastest of an arm and its variants with a limit of what is fetched ahead."""
        names = {row["arm"] for row in self.rows}
        variants = [name for name in names if name == arm or name.startswith(f"{arm}_most_")]
        rows = [self.row(name, mode, context, routing) for name in variants]
        measured = [row for row in rows if row is not None]
        return min(measured, key=lambda row: float(row["tpot_ms"]["p50"]), default=None)

    def limit_ms(self, row: Row) -> float | None:
        """max(missed bytes / measured bandwidth, resident TPOT); None without a resident row."""
        resident = self.p50("resident", row["mode"], row["context"], row["routing"])
        if resident is None or "missed_bytes" not in row:
            return None
        return max(
            float(row["missed_bytes"]) / float(self.about["link"]["copy_gbps"]) / 1e6, resident
        )

    def distance(self, row: Row) -> float | None:
        limit = self.limit_ms(row)
        return None if limit is None else float(row["tpot_ms"]["p50"]) / limit

    def link_use(self, row: Row) -> float | None:
        """Bytes per step over what the link could have moved in that time."""
        if "demand_bytes" not in row:
            return None
        moved = float(row["demand_bytes"]) + float(row["speculative_bytes"])
        return moved / (float(self.about["link"]["copy_gbps"]) * 1e6 * float(row["tpot_ms"]["p50"]))

    def exposed_share(self, row: Row) -> float | None:
        """Share of TPOT beyond the resident model's: copying that nothing hides."""
        resident = self.p50("resident", row["mode"], row["context"], row["routing"])
        return None if resident is None else 1 - resident / float(row["tpot_ms"]["p50"])

    def differing_tokens(self, row: Row) -> int | None:
        """Tokens that are not those of the resident arm in the same mode."""
        resident = self.row("resident", row["mode"], row["context"], row["routing"])
        if resident is None or "tokens" not in row:
            return None
        pairs = zip(row["tokens"], resident["tokens"], strict=True)
        return sum(int(a != b) for a, b in pairs)


def judge(results: Results, *, modes: Sequence[str] = ("graph", "compiled")) -> list[Claim]:
    """The goals, by the rows under trace-driven routing."""
    if results.dry:
        return []
    claims: list[Claim] = []
    for context, share in ((65536, 0.14), (1024, 0.09)):
        for mode in modes:
            base = results.p50("on_demand", mode, context)
            ahead = results.fastest("prefetch_no_cache", mode, context)
            text = (
                f"prefetch without cache at least {share:.0%} below on-demand at {context} tokens"
                f" ({mode})"
            )
            if base is None or ahead is None:
                claims.append(Claim(text, "-", None))
            else:
                gain = 1 - float(ahead["tpot_ms"]["p50"]) / base
                claims.append(Claim(text, f"{gain:.1%} ({ahead['arm']})", gain >= share))
    claims.append(_distance_claim(results))
    claims.append(_faster(results, "on_demand", "graph", 3.0))
    claims.append(_faster(results, "accelerate", "eager", 10.0))
    claims.append(_synchronisation_claim(results))
    return claims


def _distance_claim(results: Results) -> Claim:
    text = f"distance from the limit at most {DISTANCE_GOAL} for every cache size, CUDA graphs"
    listed: list[str] = []
    worst = 0.0
    for context in sorted({int(row["context"]) for row in results.rows}):
        rows = [results.fastest(f"specmoe_{share}", "graph", context) for share in _CACHES]
        distances = [None if row is None else results.distance(row) for row in rows]
        found = [distance for distance in distances if distance is not None]
        if len(found) < len(_CACHES):
            continue
        each = (f"{share} %: {near:.2f}" for share, near in zip(_CACHES, found, strict=True))
        listed.append(f"{', '.join(each)} at {context} tokens")
        worst = max(worst, *found)
    if not listed:
        return Claim(text, "-", None)
    return Claim(text, "; ".join(listed), worst <= DISTANCE_GOAL)


def _faster(results: Results, base_arm: str, base_mode: str, times: float) -> Claim:
    """specmoe at 50 %, exact, with CUDA graphs against another arm, at every common context."""
    text = f"specmoe exact at 50 % at least {times:g} times faster than {base_arm} (trace)"
    ratios: list[float] = []
    for context in sorted({int(row["context"]) for row in results.rows}):
        ours = results.fastest("specmoe_50", "graph", context)
        base = results.p50(base_arm, base_mode, context)
        if ours is not None and base is not None:
            ratios.append(base / float(ours["tpot_ms"]["p50"]))
    if not ratios:
        return Claim(text, "-", None)
    return Claim(text, f"least {min(ratios):.1f}x", min(ratios) >= times)


def _synchronisation_claim(results: Results) -> Claim:
    text = "0 host synchronisations per decode step, CUDA graphs"
    counts = [
        row["host_synchronisations"] + row["copies_to_host"]
        for row in results.rows
        if row["mode"] == "graph"
        and "tpot_ms" in row
        and row.get("host_synchronisations") is not None
    ]
    if not counts:
        return Claim(text, "-", None)
    return Claim(text, f"most {max(counts):g}", max(counts) == 0)


def predicted_on_cards(results: Results) -> list[str]:
    """Least TPOT that the measured misses leave on slower links; predictions, not measurements."""
    lines = ["| arm | missed/token | " + " | ".join(CARDS_GBPS) + " |"]
    lines.append("|---" * (2 + len(CARDS_GBPS)) + "|")
    contexts = [int(row["context"]) for row in results.rows]
    for arm in ("on_demand", *(f"specmoe_{share}" for share in _CACHES)):
        row = results.row(arm, "graph", min(contexts)) if contexts else None
        if row is None:
            continue
        missed = float(row["missed_bytes"])
        cells = [f"{missed / gbps / 1e6:.1f} ms" for gbps in CARDS_GBPS.values()]
        lines.append(f"| {arm} | {missed / 1e6:.0f} MB | " + " | ".join(cells) + " |")
    return lines


def write_model(results: Results) -> list[str]:
    """The tables of one model, as Markdown."""
    about, trace = results.about, results.about["trace"]
    lines = [
        f"## {results.model}",
        "",
        f"{about['layers']} layers, {about['experts']} experts, top-{about['top_k']},"
        f" {about['dtype']}; {about['store_bytes'] / 1e9:.1f} GB of experts. Link: "
        + ", ".join(f"{name} {value:.1f}" for name, value in about["link"].items())
        + ".",
        "",
        f"{trace['routing']}: recall {trace['recall_mean']:.1%}, previous token's experts"
        f" {trace['previous_token_mean']:.1%}, trace {trace['digest']}.",
        "",
        "| context | routing | arm | mode | p20 | p50 | p80 | tokens/s | hits | on demand | ahead |"
        " link | copying | exposed | synchronisations | from limit | differ |",
        "|---" * 17 + "|",
    ]
    for row in sorted(results.rows, key=lambda r: (r["context"], r["routing"] != "trace")):
        lines.append(_line(results, row))
    lines += ["", "| claim | found | holds |", "|---|---|---|"]
    lines += [f"| {c.text} | {c.found} | {c.verdict} |" for c in judge(results)]
    lines += ["", "Predicted, not measured: missed bytes over the link of smaller cards.", ""]
    return [*lines, *predicted_on_cards(results), ""]


def _line(results: Results, row: Row) -> str:
    head = [str(row["context"]), row["routing"], row["arm"], row["mode"]]
    if "not_run" in row:
        return "| " + " | ".join([*head, f"not run: {row['not_run']}"]) + " |" + " |" * 12
    tpot = row["tpot_ms"]
    cells = [_cell(tpot.get(p), "{:.2f}") for p in ("p20", "p50", "p80")]
    cells.append(f"{1e3 / tpot['p50']:.1f}")
    cells.append(_cell(row.get("hit_rate"), "{:.0%}"))
    for name in ("demand_bytes", "speculative_bytes"):
        value = row.get(name)
        cells.append(_cell(None if value is None else value / 1e6, "{:.0f} MB"))
    cells.append(_cell(results.link_use(row), "{:.0%}"))
    cells.append(_cell(row.get("copying_share"), "{:.0%}"))
    cells.append(_cell(results.exposed_share(row), "{:.0%}"))
    cells.append(_cell(row.get("host_synchronisations"), "{:g}"))
    cells.append(_cell(results.distance(row), "{:.2f}"))
    cells.append(_cell(results.differing_tokens(row), "{}"))
    if "scaled" in row:
        head[2] += f" (scaled {row['scaled']})"
    return "| " + " | ".join([*head, *cells]) + " |"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def write_markdown(data: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = ["# Decode at full model size", ""]
    if data["dry"]:
        lines += ["**Dry run on the CPU with tiny models: no figure here means anything.**", ""]
    lines += [
        f"Commit {data['commit']}, {data['device']}, {data['versions']}, seed {data['seed']}.",
        "",
    ]
    for check in data.get("checks", []):
        lines.append(
            f"- tokens of {check['model']}, {check['arm']}, {check['mode']}, {check['routing']}:"
            f" {check['differing_tokens']} of {check['tokens']} differ from the unmodified model"
        )
    lines.append("")
    for model in data["models"]:
        lines += write_model(Results(data, model))
    return "\n".join(lines)
