"""Check families and write the manual's table, docs/models.md.

    python -m tests.models.manual --results walk.json                 every family, a row at a time
    python -m tests.models.manual --results walk.json jamba zaya      these, merged into the rows
    python -m tests.models.manual --results walk.json --write docs/models.md

A family whose row the file has for the same cases, versions and seed is not run again, so that the
walk, which takes hours on two cores, can be stopped and taken up.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from specmoe_compile.bench.machine import commit_or_none, describe_machine, versions
from tests.models.families import families
from tests.models.rows import Row, cases_of, problems, row_not_run, row_of, row_without_model
from tests.models.walk import (
    INDUCTOR,
    NEW_TOKENS,
    OFFLOADED,
    PLAIN,
    QUICK_DYNAMIC,
    QUICK_STATIC,
    Case,
    check_family,
)

_HEADER = (
    "family",
    "class",
    "MoE layers found",
    "router",
    "shared experts",
    "expert layout",
    "exact",
    "layers predicted",
    "notes",
)
_VERSIONS = ("python", "torch", "transformers")
CASES = {
    "full": (OFFLOADED, PLAIN),
    "quick": ((QUICK_STATIC,), ()),
    "rest": ((QUICK_DYNAMIC,), (QUICK_STATIC,)),
    "inductor": ((INDUCTOR,), ()),
    "grown": ((Case(cache="dynamic", batch=3),), ()),
}
SEED = 0
_ROOT = Path(__file__).parents[2]
MANUAL = _ROOT / "docs" / "models.md"
RESULTS = _ROOT / "benchmarks" / "results" / "models_walk.json"

_INTRODUCTION = """# Models

Every modeling file of transformers whose experts use the experts interface
(`use_experts_implementation`), found by walking the installed package. `tests/models` builds a tiny
random model of each, saves it in its hub format with `save_pretrained`, and compares with the
unmodified eager model in float32. This page is written by that walk
(`python -m tests.models.manual --results FILE --write docs/models.md`); do not edit it.

With transformers 5.23 its 63 families were exact in four or five cases each, 60 with speculation
([data](../benchmarks/results/models_walk_5_23.json)).
"""

_COLUMNS = """
- **class**: the class that was run, a causal language model where the file has one. Multimodal
  classes are run on text here; with an image, see `tests/models/test_multimodal.py`.
- **MoE layers found**: experts modules that the session holds, of those in the tiny model. Every
  expert of every layer of the expert store was compared bit by bit with the loaded model's.
- **router**: what is applied to its scores, in order, as observed; *bias* is added to the scores
  for the choice, *groups* limits the choice to the best groups of experts.
- **expert layout**: gate and up projection in one tensor (*gated*), alternating (*interleaved*);
  with biases; stored *transposed*; normalised after the experts (*post norm*).
- **exact**: greedy tokens are equal and logits differ by at most 1e-3 in every case that was run
  (listed below): offloaded (experts on disk, half of them in the cache, speculation on, policy
  `exact`) or plain (compiled in place); batch 3 is padded on the left; *eager* runs the rewritten
  graph node by node, *inductor* compiles it.
- **layers predicted**: MoE layers whose experts a lookahead router predicts, of all but the first,
  in the graph that predicts fewest.

No graph breaks in any of these runs, unless the notes say so.
"""


def render(results: Mapping[str, Any]) -> str:
    """The manual's page, of results as `save` writes them."""
    known = {name: Row.from_json(row) for name, row in results["rows"].items()}
    rows = [known.get(name) or row_not_run(family) for name, family in sorted(families().items())]
    ran = [row for row in rows if row.layers]
    parts = [
        _INTRODUCTION,
        _provenance(results),
        f"{len(rows)} modeling files, {len(ran)} of them checked:"
        f" {sum(row.exact for row in ran)} exact, {sum(row.speculates for row in ran)} with"
        " speculation. A family has a result only where its check agrees with the rule, or with an"
        " exception that its notes state; for the others nothing is claimed.\n",
        "\n".join(_table([row.cells() for row in rows])),
        _COLUMNS,
        _cases(ran),
    ]
    return "\n".join(parts)


def _provenance(results: Mapping[str, Any]) -> str:
    used = results["versions"]
    commits = dict.fromkeys(name[:7] for name in results["commits"])
    return (
        f"Versions: torch {used['torch']}, transformers {used['transformers']}, Python"
        f" {used['python']}; on a CPU ({results['machine']['cores']} cores), not on a GPU."
        f" Commits: {', '.join(commits)}. Seed {SEED}. {results['new_tokens']} tokens per case.\n"
    )


def _cases(rows: Iterable[Row]) -> str:
    """Which cases were run, of which families: the fewest that any claim here rests on."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(row.cases, []).append(f"`{row.family}`")
    lines = ["## Cases that were run\n"]
    for cases, names in groups.items():
        lines.append(f"- {'; '.join(cases)}: {', '.join(names)}")
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [_HEADER, ["---"] * len(_HEADER), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def page_rows(page: Path) -> dict[str, list[str]]:
    """Family -> cells of its row on a page that `render` made."""
    rows = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
            rows[cells[0].strip("`")] = cells
    return rows


def page_version(page: Path) -> str:
    """The version of transformers that a page was made with."""
    found = re.search(r"transformers (\d[\w.]*)", page.read_text(encoding="utf-8"))
    assert found is not None, f"{page} names no version of transformers"
    return found.group(1)


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write results to a temporary file that then takes the name."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Results of earlier runs, or new ones; raises `ValueError` for those of other versions."""
    used = {name: version for name, version in versions().items() if name in _VERSIONS}
    if not path.exists():
        return {
            "versions": used,
            "machine": describe_machine(),
            "schema": 1,
            "commits": [],
            "seed": SEED,
            "new_tokens": NEW_TOKENS,
            "rows": {},
        }
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results["versions"] != used:
        raise ValueError(
            f"{path} holds rows of {results['versions']}, this is {used}: name another file."
        )
    return results


def check_one(
    name: str, offloaded: Sequence[Case], plain: Sequence[Case]
) -> tuple[Row | None, list[str]]:
    """Check a family; returns its row, and how it departs from the rule or its exception."""
    family = families()[name]
    if family.model_class is None:
        return row_without_model(family), []
    offloaded, plain = cases_of(name, offloaded, plain)
    try:
        with tempfile.TemporaryDirectory() as folder:
            check = check_family(family, Path(folder), offloaded=offloaded, plain=plain)
    except Exception as error:  # the next family is checked all the same
        traceback.print_exc()
        return None, [f"{type(error).__name__}: {error}"]
    return row_of(check), problems(check)


def walk(names: Sequence[str], path: Path, cases: str) -> int:
    """Check families one after the other, saving after each; returns how many have problems.

    The file is read anew before each row is added: two walks may share it.
    """
    offloaded, plain = CASES[cases]
    failed = 0
    for name in names:
        row, found = check_one(name, offloaded, plain)
        torch._dynamo.reset()
        for problem in found:
            print(f"{name}: {problem}", flush=True)
        failed += bool(found)
        if row is not None:
            print("| " + " | ".join(row.cells()) + " |", flush=True)
        if row is not None and not found:
            results = load(path)
            known = results["rows"].get(name)
            row = row if known is None else Row.from_json(known).merged(row)
            results["rows"][name] = row.as_json()
            results["commits"] = sorted({*results["commits"], commit_or_none() or "unknown"})
            save(path, results)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if a family has problems, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("families", nargs="*", help="names; all that have no row by default")
    parser.add_argument("--results", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--cases", choices=CASES, default="full")
    parser.add_argument("--write", type=Path, help="write the page of the rows there, run nothing")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.families) - set(families()))
    if unknown:
        parser.error(f"unknown families {', '.join(unknown)}; valid are {', '.join(families())}")
    try:
        results = load(options.results)
    except ValueError as error:
        parser.error(str(error))
    if options.write is not None:
        options.write.write_text(render(results), encoding="utf-8")
        return 0
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = options.families or [name for name in families() if name not in results["rows"]]
    return 1 if walk(names, options.results, options.cases) else 0


if __name__ == "__main__":
    sys.exit(main())
