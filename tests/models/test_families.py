"""Every family end to end (slow), and the twelve that differ most in the fast tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.models.exceptions import EXCEPTIONS
from tests.models.families import Family, families, family_names
from tests.models.manual import MANUAL, RESULTS, page_rows, page_version, render
from tests.models.rows import Row, cases_of, problems, row_of, row_without_model
from tests.models.walk import (
    OFFLOADED,
    PLAIN,
    QUICK_DYNAMIC,
    QUICK_SILENT,
    QUICK_STATIC,
    QUICK_TOKENS,
    Check,
    check_family,
)

# What is particular about each.
FAST = {
    "gpt_oss": "interleaved, biased, transposed",
    "deepseek_v3": "sigmoid, groups, bias, shared experts, a dense layer first",
    "qwen3_next": "linear attention, a gate on the shared expert",
    "mixtral": "renamed block",
    "granitemoe": "packed in linear layers, scaled residual",
    "phimoe": "sparse mixer, no top-k",
    "jamba": "Mamba, dense and MoE layers in turn",
    "nemotron_h": "no gate, one mixer per block",
    "minimax": "lightning attention, scaled residual",
    "ernie4_5_moe": "softmax with bias",
    "lfm2_moe": "short convolutions",
    "gemma4": "router beside the dense MLP",
}
# This one grows its cache, which compiles one graph more; the others have a static one.
DYNAMIC = ("lfm2_moe",)
# These run without predictions, too, as all do in `test_every_family`.
SILENT = ("gpt_oss", "mixtral")
# These ignore the static cache that they are given: a third step would compile one graph more.
NO_STATIC = ("jamba", "minimax")
# By what makes their graphs differ: shared experts, sparse mixers, Mamba, linear attention.
MUST_WORK = (
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
)
OF_THIS_VERSION = pytest.mark.skipif(
    transformers.__version__ != page_version(MANUAL),
    reason=f"the manual is of transformers {page_version(MANUAL)}",
)


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def assert_as_documented(check: Check) -> None:
    """The check found nothing but the family's exception, and the manual says what it saw."""
    assert problems(check) == []
    assert page_rows(MANUAL)[check.family.name] == row_of(check).cells()


@pytest.mark.parametrize("name", FAST)
def test_families_that_differ_most(name: str, tmp_path: Path) -> None:
    case = QUICK_DYNAMIC if name in DYNAMIC else QUICK_STATIC
    new_tokens = 2 if name in NO_STATIC else QUICK_TOKENS
    cases = (case, QUICK_SILENT) if name in SILENT else (case,)
    check = check_family(
        families()[name], tmp_path, offloaded=cases, plain=(), new_tokens=new_tokens
    )
    assert_as_documented(check)
    if name in SILENT:
        graphs = [report for report in check.offloaded[QUICK_SILENT].reports if report.matches]
        assert graphs and not any(r.matches.get("insert_expert_prefetch") for r in graphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", family_names())
def test_every_family(name: str, tmp_path: Path) -> None:
    if families()[name].model_class is None:
        pytest.skip("no class of its file generates text")
    offloaded, plain = cases_of(name, OFFLOADED, PLAIN)
    assert_as_documented(check_family(families()[name], tmp_path, offloaded=offloaded, plain=plain))


def _without_model() -> list[Family]:
    return [family for family in families().values() if family.model_class is None]


def test_files_without_a_model_that_generates_have_a_row_that_says_so() -> None:
    rows = page_rows(MANUAL)
    for family in _without_model():
        assert rows[family.name] == row_without_model(family).cells()
    assert [family.name for family in _without_model()] == ["openai_privacy_filter"]


@OF_THIS_VERSION
def test_the_manual_has_every_family_and_no_other() -> None:
    assert set(page_rows(MANUAL)) == set(families())
    assert set(EXCEPTIONS) <= set(families())


@OF_THIS_VERSION
def test_every_family_is_exact_and_nearly_all_speculate() -> None:
    """Of all families that there are: one without a result counts as one that does neither."""
    rows = page_rows(MANUAL)
    exact, predicted = 6, 7
    with_model = [name for name, family in families().items() if family.model_class is not None]
    assert set(family_names()) == set(families())
    assert [name for name in with_model if rows[name][exact] != "yes"] == []
    silent = [name for name in with_model if rows[name][predicted] in ("", "no")]
    assert len(silent) <= 0.05 * len(with_model)
    assert set(silent) <= set(EXCEPTIONS), "each is pinned by an exception"


def test_families_that_must_work_need_no_exception() -> None:
    rows = page_rows(MANUAL)
    for name in MUST_WORK:
        layers, (got, of) = rows[name][2].split(" of "), rows[name][7].split(" of ")
        assert layers[0] == layers[1] and got == of, rows[name]
        assert rows[name][8] == "" and name not in EXCEPTIONS


@OF_THIS_VERSION
def test_the_manual_is_what_the_results_say() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert render(results) == MANUAL.read_text(encoding="utf-8")
    assert not any(commit.endswith("-dirty") for commit in results["commits"])
    for name, fields in results["rows"].items():
        row = Row.from_json(fields)
        exception = EXCEPTIONS.get(name)
        assert row.notes == ("" if exception is None else exception.note)


@pytest.mark.slow
def test_glm5_next_speculates_where_sizes_may_be_data(tmp_path: Path) -> None:
    """What the note of its exception says."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check = check_family(
            families()["glm5_next"],
            tmp_path,
            offloaded=(QUICK_STATIC,),
            plain=(),
            new_tokens=QUICK_TOKENS,
        )
    assert check.differences() == [] and check.graph_breaks() == {}
    assert check.predicted() == check.layers_in_model - 1
