"""Options are typed: unknown names and bad values are one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from specmoe_compile.options import CompileOptions, option_table


def test_defaults_are_exact_with_prefetch_where_it_pays() -> None:
    options = CompileOptions.from_kwargs()
    assert (options.policy, options.prefetch, options.lookahead) == ("exact", "auto", 1)


def test_unknown_option_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'polcy'; did you mean 'policy'\? .*lookahead"):
        CompileOptions.from_kwargs({"polcy": "exact"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefetch", "always"),
        ("prefetch", "True"),
        ("prefetch", 1),
        ("prefetch", None),
        ("policy", "fast"),
        ("commit_weights", "both"),
        ("lowering", "cuda"),
        ("lookahead", 0),
        ("lookahead", True),
        ("prefetch_width", 0),
        ("prefetch_budget_bytes", -1),
        ("cpu_math", "int4"),
        ("default_vector_threshold", 1.5),
        ("default_vector_threshold", "high"),
        ("skip_layers", "some"),
        ("skip_layers", (-1,)),
        ("nvtx", 1),
        ("default_vectors", 3),
        ("mode", "fastest"),
    ],
)
def test_bad_value_names_the_option(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        CompileOptions.from_kwargs({name: value})


def test_approximate_policy_needs_prefetch() -> None:
    with pytest.raises(ValueError, match="prefetch=True"):
        CompileOptions.from_kwargs({"policy": "commit", "prefetch": False})


def test_torch_compile_modes_are_understood() -> None:
    assert CompileOptions.from_kwargs(mode="reduce-overhead").mode == "reduce-overhead"
    assert CompileOptions.from_kwargs(mode="max-autotune-no-cudagraphs").mode == "default"


def test_strict_can_be_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMOE_STRICT", "0")
    assert not CompileOptions.from_kwargs().strict
    monkeypatch.setenv("SPECMOE_STRICT", "1")
    assert CompileOptions.from_kwargs().strict


def test_documents_hold_the_options_as_they_are_declared() -> None:
    root = Path(__file__).parents[1]
    found = [
        text.partition("<!-- options: ")[2].partition("-->\n")[2].partition("\n<!-- /options")[0]
        for path in (root / "README.md", *(root / "docs").glob("*.md"))
        if "<!-- options: " in (text := path.read_text())
    ]
    assert found and all(table == option_table() for table in found), option_table()
