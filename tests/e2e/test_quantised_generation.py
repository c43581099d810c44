"""Tokens from codes are those of the model that is dequantised in float32, whatever is guessed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import specmoe_compile
from specmoe_compile.hf.attach import session_of
from specmoe_compile.runtime.experts.formats.quantise import QUANTISED_FORMATS
from tests.e2e.test_quantize_option import quantised_by_hand
from tests.helpers import greedy, prompts
from tests.runtime import tiny_checkpoints
from tests.runtime.quantised_checkpoints import VARIETIES, write_pair
from tests.runtime.test_packing import load_reference

NEW_TOKENS = 8
GPT_OSS = ("mxfp4 checkpoint", "int4", "mxfp4", "fp8", "int8")


def _mostly_slow(names: tuple[str, ...], fast: str) -> list[Any]:
    """One case for every run, with one pair of batch and cache; the others are slow."""
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load_qwen3(variety: str, tmp_path: Path, **options: Any) -> tuple[Any, Any]:
    """An offloaded quantised model with a cache that misses, and the plain one that it means."""
    folder, plain = write_pair(variety, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    return offloaded(folder, tmp_path, **options), reference.eval()


def load_gpt_oss(form: str, tmp_path: Path) -> tuple[Any, Any]:
    if form == "mxfp4 checkpoint":
        folder = tiny_checkpoints.write("gpt_oss_mxfp4", tmp_path / "model")
        reference = load_reference(folder, dtype=torch.float32).eval()
        return offloaded(folder, tmp_path), reference
    folder = tiny_checkpoints.write("gpt_oss", tmp_path / "model")
    return offloaded(folder, tmp_path, quantize=form), quantised_by_hand(folder, form)


def offloaded(folder: Path, tmp_path: Path, **options: Any) -> Any:
    return specmoe_compile.from_pretrained(
        folder,
        device="cpu",
        dtype="float32",
        store="disk",
        expert_cache="50%",
        cache_policy="lru",  # by others the ring holds what is not cached
        store_dir=tmp_path / "store",
        progress=False,
        **options,
    )


STATIC: dict[str, Any] = {"cache_implementation": "static"}
EVERY_PAIR = ((1, STATIC), (1, {}), (3, STATIC), (3, {}))


def check_tokens(model: Any, reference: Any, *, lowering: str, pairs: Any = EVERY_PAIR) -> None:
    """Prefill and decode, with guesses.

    `pairs`: batch and cache; each compiles.
    """
    options = {"lowering": lowering, "prefetch": True}
    compiled = torch.compile(model, backend="specmoe", options=options)
    for batch, kwargs in pairs:
        ids = prompts(batch, 7)
        want = greedy(reference, ids, NEW_TOKENS)
        assert torch.equal(greedy(compiled, ids, NEW_TOKENS, **kwargs), want)
    stats = session_of(model).stats
    assert stats.total.speculative_bytes > 0, "nothing was guessed"
    specmoe_compile.close(model)


@pytest.mark.parametrize("variety", _mostly_slow(tuple(VARIETIES), "ct_nvfp4"))
def test_qwen3_moe_generates_what_its_codes_mean(variety: str, tmp_path: Path) -> None:
    pairs = ((1, STATIC),) if variety == "ct_nvfp4" else EVERY_PAIR
    check_tokens(*load_qwen3(variety, tmp_path), lowering="eager", pairs=pairs)


@pytest.mark.slow
@pytest.mark.parametrize("form", QUANTISED_FORMATS)
def test_qwen3_moe_generates_what_it_was_quantised_to(form: str, tmp_path: Path) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    model = offloaded(folder, tmp_path, quantize=form)
    check_tokens(model, quantised_by_hand(folder, form), lowering="eager")


@pytest.mark.parametrize("form", _mostly_slow(GPT_OSS, "mxfp4 checkpoint"))
def test_gpt_oss_generates_what_its_codes_mean(form: str, tmp_path: Path) -> None:
    pairs = ((3, {}),) if form == "mxfp4 checkpoint" else EVERY_PAIR
    check_tokens(*load_gpt_oss(form, tmp_path), lowering="eager", pairs=pairs)


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path: Path) -> None:
    check_tokens(*load_gpt_oss("mxfp4 checkpoint", tmp_path), lowering="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["default_vector", "commit"])
def test_approximate_policies_run_from_codes(policy: str, tmp_path: Path) -> None:
    model, reference = load_qwen3("ct_int4", tmp_path)
    options: dict[str, Any] = {"lowering": "eager", "policy": policy}
    if policy == "default_vector":
        options["default_vector_threshold"] = 0.0  # nothing is left out: the exact tokens
    compiled = torch.compile(model, backend="specmoe", options=options)
    ids = prompts(1, 7)
    tokens = greedy(compiled, ids, NEW_TOKENS)
    assert tokens.shape == (1, 7 + NEW_TOKENS)
    if policy == "default_vector":
        assert torch.equal(tokens, greedy(reference, ids, NEW_TOKENS))


def test_counters_count_packed_bytes(tmp_path: Path) -> None:
    model, _ = load_qwen3("ct_int4", tmp_path)
    session = session_of(model)
    greedy(model, prompts(1, 7), 4)
    stats, record = session.stats, session.store.layouts[0].record_bytes
    payload = session.store.layouts[0].payload_bytes
    assert payload == 3 * (64 * 32 + 64 * 2 * 2)  # codes, and a bfloat16 scale per 32
    assert stats.store_bytes == session.store.total_bytes == 2 * 8 * record
    assert stats.total.demand_bytes == stats.total.misses * record > 0
    assert (stats.experts, stats.record_bytes) == ("int4, groups of 32", record)
