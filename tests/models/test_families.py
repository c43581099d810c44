"""Every family end to end (slow), and the twelve that differ most in the fast tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.models.exceptions import EXCEPTIONS
from tests.models.families import Family, families
from tests.models.manual import MANUAL, page_rows, page_version
from tests.models.rows import cases_of, problems, row_of, row_without_model
from tests.models.walk import (
    OFFLOADED,
    PLAIN,
    QUICK_DYNAMIC,
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
# These grow their cache, which compiles one graph more; the others have a static one.
DYNAMIC = ("mixtral", "lfm2_moe")
WITH_MODEL = [name for name, family in families().items() if family.model_class is not None]


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
    check = check_family(
        families()[name], tmp_path, offloaded=(case,), plain=(), new_tokens=QUICK_TOKENS
    )
    assert_as_documented(check)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MODEL)
def test_every_family(name: str, tmp_path: Path) -> None:
    offloaded, plain = cases_of(name, OFFLOADED, PLAIN)
    assert_as_documented(check_family(families()[name], tmp_path, offloaded=offloaded, plain=plain))


def _without_model() -> list[Family]:
    return [family for family in families().values() if family.model_class is None]


def test_files_without_a_model_that_generates_have_a_row_that_says_so() -> None:
    rows = page_rows(MANUAL)
    for family in _without_model():
        assert rows[family.name] == row_without_model(family).cells()
    assert [family.name for family in _without_model()] == ["openai_privacy_filter"]


def test_the_manual_has_every_family_and_no_other() -> None:
    if transformers.__version__ != page_version(MANUAL):
        pytest.skip(f"the manual is of transformers {page_version(MANUAL)}")
    assert set(page_rows(MANUAL)) == set(families())
    assert set(EXCEPTIONS) <= set(families())


def test_nearly_all_families_of_the_manual_are_exact_and_speculate() -> None:
    rows = [cells for cells in page_rows(MANUAL).values() if cells[2]]
    exact, predicted = 6, 7
    assert all(cells[exact] == "yes" for cells in rows)
    speculating = [cells for cells in rows if cells[predicted] != "no"]
    assert len(speculating) >= 0.95 * len(rows)
