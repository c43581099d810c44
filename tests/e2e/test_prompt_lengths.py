"""Prompts of any length after each other, and which of their steps would be CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import specmoe_compile
from specmoe_compile import backend
from specmoe_compile.passes.choose_capture import why_not_captured_or_none
from tests.e2e.prompt_lengths import LENGTHS, check_lengths, load_plain, offload

CASES = [("static", 1), ("static", 3), ("dynamic", 1), ("dynamic", 3)]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each compiled graph: tokens per row (0 if that varies), whether it would be captured."""
    found: list[tuple[int, bool]] = []
    lower = backend._lower

    def recording(gm: Any, *args: Any) -> Any:
        (ids,) = (n for n in gm.graph.find_nodes(op="placeholder") if "input_ids" in n.name)
        width = ids.meta["example_value"].shape[1]
        captures = why_not_captured_or_none(gm) is None
        found.append((width if isinstance(width, int) else 0, captures))
        return lower(gm, *args)

    monkeypatch.setattr(backend, "_lower", recording)
    return found


def check(
    checkpoint: Path, captured: list[tuple[int, bool]], cache: str, batch: int, lengths: Any
) -> None:
    model, compiled = offload(checkpoint, "cpu", lowering="eager")
    try:
        plain = load_plain(checkpoint, "cpu")
        check_lengths(compiled, plain, cache=cache, batch=batch, lengths=lengths)
    finally:
        specmoe_compile.close(model)
    graphs = {width for width, captures in captured if captures}
    assert graphs == ({1} if cache == "static" else set()), captured


def test_short_prompts_with_a_static_cache(
    checkpoint: Path, captured: list[tuple[int, bool]]
) -> None:
    check(checkpoint, captured, "static", 1, (9, 1))
    assert (9, False) in captured and (1, False) in captured, "both set up a cache"


def test_a_short_prompt_with_a_dynamic_cache(
    checkpoint: Path, captured: list[tuple[int, bool]]
) -> None:
    check(checkpoint, captured, "dynamic", 1, (9,))


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "batch"), CASES)
def test_all_lengths(
    cache: str, batch: int, checkpoint: Path, captured: list[tuple[int, bool]]
) -> None:
    check(checkpoint, captured, cache, batch, LENGTHS)
