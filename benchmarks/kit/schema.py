"""What every JSON file in `benchmarks/results` says about itself, beside its own figures.

`schema` is an integer, which the benchmark raises when its figures change their meaning. `commit`,
`machine` and `versions` say where the figures come from (`bench.machine.provenance`). A file of
several phases may say so phase by phase, and one that grew over several commits names them in
`commits`. What a run did not record is null, and `note` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS: Mapping[str, type] = {"commit": str, "machine": dict, "versions": dict}


def problems(result: Any) -> list[str]:
    """What is wrong with a result's head, a sentence each; nothing if all is well."""
    if not isinstance(result, dict):
        return [f"the file holds a {type(result).__name__}, expected an object"]
    schema = result.get("schema")
    found = []
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        found.append(f"schema is {schema!r}, expected an integer of at least 1")
    phases = {name: value for name, value in result.items() if name != "schema"}
    by_phase = bool(phases) and all(
        isinstance(value, dict) and _KINDS.keys() <= value.keys() for value in phases.values()
    )
    for where, head in phases.items() if by_phase else [("", result)]:
        found += [f"{where}: {problem}" if where else problem for problem in _head(head)]
    return found


def _head(head: Mapping[str, Any]) -> list[str]:
    found = []
    for name, kind in _KINDS.items():
        value = head.get(name)
        if name == "commit" and name not in head:
            commits = head.get("commits")
            if isinstance(commits, list) and commits and all(isinstance(c, str) for c in commits):
                continue
        if value is None and name in head and isinstance(head.get("note"), str):
            continue
        if not isinstance(value, kind) or not value:
            expected = f"{kind.__name__}, or null with a note that says why"
            found.append(f"{name} is {value!r}, expected {expected}")
    return found
