"""One family's row of the manual, and what a check must agree with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tests.models.exceptions import EXCEPTIONS, Exceptional
from tests.models.families import Family
from tests.models.walk import Case, Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the manual says about a family.

    Attributes:
        family, model_class: modeling folder, and the class that was run.
        layers: MoE layers found of MoE layers in the tiny model, "4/4"; "" where nothing ran.
        router, shared_experts, layout: see `Description`.
        exact: tokens and logits are the unmodified eager model's in every case.
        predicted: MoE layers predicted in the graph that predicts fewest.
        notes: an exception's reason.
        cases: (offloaded and plain) cases that were run, in words; not in the table.
    """

    family: str
    model_class: str
    layers: str = ""
    router: str = ""
    shared_experts: bool = False
    layout: str = ""
    exact: bool = False
    predicted: int = 0
    notes: str = ""
    cases: tuple[str, ...] = ()

    @property
    def speculates(self) -> bool:
        """Whether any layer is predicted in every graph."""
        return self.predicted > 0

    def merged(self, other: Row) -> Row:
        """The row of two checks of the same family with different cases."""
        same = ("family", "model_class", "layers", "router", "shared_experts", "layout", "notes")
        for name in same:
            assert getattr(self, name) == getattr(other, name), f"{self.family}: {name}"
        return replace(
            self,
            exact=self.exact and other.exact,
            predicted=min(self.predicted, other.predicted),
            cases=tuple(dict.fromkeys((*self.cases, *other.cases))),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Row:
        return cls(**{**fields, "cases": tuple(fields["cases"])})

    def cells(self) -> list[str]:
        """The row of the manual's table."""
        if not self.layers:
            return [f"`{self.family}`", self.model_class, *[""] * 6, self.notes]
        found, _, total = self.layers.partition("/")
        speculation = f"{self.predicted} of {int(total) - 1}" if self.speculates else "no"
        return [
            f"`{self.family}`",
            f"`{self.model_class}`",
            f"{found} of {total}",
            self.router,
            "yes" if self.shared_experts else "no",
            self.layout,
            "yes" if self.exact else "**no**",
            speculation,
            self.notes,
        ]


def cases_of(
    name: str, offloaded: Sequence[Case], plain: Sequence[Case]
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases to run of a family, offloaded and plain.

    A case that the eager model cannot do is kept, so that its error is seen, and the same with a
    dynamic cache comes with it.
    """
    exception = EXCEPTIONS.get(name, Exceptional(note=""))

    def possible(cases: Sequence[Case]) -> tuple[Case, ...]:
        wanted = list(cases)
        for case in cases:
            if (case.cache, case.batch) in exception.impossible:
                wanted.append(replace(case, cache="dynamic"))
        return tuple(dict.fromkeys(wanted))

    return possible(offloaded), possible(plain)


def row_of(check: Check) -> Row:
    """The row of a family that was checked."""
    exception = EXCEPTIONS.get(check.family.name)
    cases = [f"offloaded, {case}" for case in check.offloaded]
    cases += [f"plain, {case}" for case in check.plain]
    return Row(
        family=check.family.name,
        model_class=check.family.class_name,
        layers=f"{check.layers_found}/{check.layers_in_model}",
        router=check.description.router,
        shared_experts=check.description.shared_experts,
        layout=check.description.layout,
        exact=bool(check.offloaded) and not check.differences(),
        predicted=check.predicted(),
        notes="" if exception is None else exception.note,
        cases=tuple(cases),
    )


def row_without_model(family: Family) -> Row:
    """The row of a file none of whose classes generates text."""
    assert family.model_class is None
    return Row(family=family.name, model_class="", notes=EXCEPTIONS[family.name].note)


def row_not_run(family: Family) -> Row:
    """The row of a family without a result: it claims nothing."""
    if family.model_class is None:
        return row_without_model(family)
    return Row(family=family.name, model_class=family.class_name, notes="**not checked yet**")


def problems(check: Check) -> list[str]:
    """How a check departs from the rule, or from its family's exception; empty when it does not."""
    want = EXCEPTIONS.get(check.family.name, Exceptional(note=""))
    impossible = {k: pattern for k, pattern in want.impossible.items() if k in check.reference}
    found = [
        *_mapping_problems("the eager model fails", impossible, check.impossible()),
        *_mapping_problems("MoE layer is not predicted", want.unpredicted, check.unpredicted()),
        *_sequence_problems("it is not exact", want.differences, check.differences()),
        *_sequence_problems("graph break", want.graph_breaks, list(check.graph_breaks())),
    ]
    new = sorted(set(check.graph_breaks()) - set(check.stock_graph_breaks))
    found += [f"graph break that stock transformers does not have: {reason}" for reason in new]
    if not check.offloaded:
        found.append("no case was run offloaded: the eager model itself cannot do any")
    expected = check.layers_in_model - 1 - len(want.unpredicted) - want.unused
    if want.only_prefill:
        expected = 0
        found += [f"not a graph of prefill: {report}" for report in check.decode_reports()]
    if check.predicted() != expected:
        found.append(f"{check.predicted()} MoE layers predicted, expected {expected}")
    return found


def _mapping_problems(what: str, want: Mapping[Any, str], got: Mapping[Any, str]) -> list[str]:
    found = []
    for key in sorted({*want, *got}, key=str):
        if key not in got:
            found.append(f"{what} ({key}): the exception is gone ({want[key]})")
        elif key not in want:
            found.append(f"{what} ({key}): {got[key]}")
        elif not re.search(want[key], got[key]):
            found.append(f"{what} ({key}): {got[key]}, expected {want[key]}")
    return found


def _sequence_problems(what: str, want: Sequence[str], got: Sequence[str]) -> list[str]:
    found = [f"{what}: {text}" for text in got if not any(re.search(p, text) for p in want)]
    found += [
        f"{what}: the exception is gone ({pattern})"
        for pattern in want
        if not any(re.search(pattern, text) for text in got)
    ]
    return found
