"""Fidelity: exact policies measure exact, approximate ones do not, and the sums are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import specmoe_compile
from specmoe_compile.calibrate.fidelity import Evaluator, Fidelity, PolicyRun
from specmoe_compile.errors import CompileError
from specmoe_compile.hf.attach import session_of
from specmoe_compile.options import CompileOptions
from specmoe_compile.runtime.cache.statistics import LayerStats
from tests.helpers import prompts, prompts_left_to_the_model, tiny_qwen3_moe

WINDOW, CONTEXT, NEW_TOKENS = 24, 18, 6


_RUNS = {
    "exact": PolicyRun(),
    "every miss": PolicyRun(policy="default_vector", threshold=1.0),
    "no miss": PolicyRun(policy="default_vector", threshold=0.0),
    "predicted": PolicyRun(policy="commit"),
    "true": PolicyRun(policy="commit", commit_weights="true"),
    "skipped": PolicyRun(policy="commit", skip_layers=(1, 2)),
    "all skipped": PolicyRun(policy="default_vector", threshold=1.0, skip_layers=(0, 1, 2)),
}


def _evaluator(folder: Path, **kwargs: Any) -> Evaluator:
    model = specmoe_compile.offload(
        tiny_qwen3_moe(), store="disk", store_dir=folder, expert_cache="40%"
    )
    sizes = {"windows": prompts(2, WINDOW), "prompts": prompts(3, 20, seed=1)} | kwargs
    return Evaluator(
        model,
        session_of(model),
        tiny_qwen3_moe(),
        context=CONTEXT,
        new_tokens=NEW_TOKENS,
        options=CompileOptions(lowering="eager"),
        **sizes,
    )


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    return _evaluator(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def results(evaluator: Evaluator) -> dict[str, dict[str, Any]]:
    """Every policy of `_RUNS`, measured by one evaluator: it compiles once for all of them."""
    found = {}
    for name, run in _RUNS.items():
        done: list[int] = []
        with prompts_left_to_the_model():
            found[name] = evaluator.measure(run, done.append).as_dict()
        assert sum(done) == evaluator.steps_per_run == 5
    return found


Results = dict[str, dict[str, Any]]


def test_exact_is_the_unmodified_model(results: Results) -> None:
    found = results["exact"]
    assert found["tokens"] == 2 * (WINDOW - CONTEXT - 1)
    assert found["greedy_agreement"] == found["top1_agreement"] == 1.0
    assert found["greedy_tokens"] == 3 * NEW_TOKENS and found["greedy_same_prompts"] == 3
    # float32, other kernels for one token than for a window.
    assert abs(found["loss_increase_nats"]) < 1e-4 and abs(found["kl_nats"]) < 1e-4
    assert found["bytes_per_token"] > 0 and 0 < found["recall"] < 1
    assert found["skipped_experts_per_token"] == 0


def test_loss_is_the_unmodified_models_own(results: Results) -> None:
    model, text = tiny_qwen3_moe(), prompts(2, WINDOW)
    with torch.no_grad():
        logits = model(text).logits
    want = functional.cross_entropy(
        logits[:, CONTEXT:-1].reshape(-1, logits.shape[-1]), text[:, CONTEXT + 1 :].reshape(-1)
    )
    assert results["exact"]["loss_nats"] == pytest.approx(want.item(), abs=1e-4)


def test_default_vectors_for_every_miss_move_fewer_bytes(results: Results) -> None:
    exact, cheap = results["exact"], results["every miss"]
    assert cheap["demand_bytes_per_token"] < exact["demand_bytes_per_token"]
    assert cheap["skipped_experts_per_token"] > 0
    assert cheap["kl_nats"] > 1e-4


def test_threshold_zero_is_exact(results: Results) -> None:
    found = results["no miss"]
    assert found["greedy_agreement"] == 1.0 and found["skipped_experts_per_token"] == 0
    assert abs(found["kl_nats"]) < 1e-4


@pytest.mark.parametrize("weights", ["predicted", "true"])
def test_committing_changes_the_output(results: Results, weights: str) -> None:
    found = results[weights]
    assert found["kl_nats"] > 1e-4 and found["skipped_experts_per_token"] > 0


@pytest.mark.parametrize("name", ["skipped", "all skipped"])
def test_every_layer_skipped_is_exact(results: Results, name: str) -> None:
    found = results[name]
    assert found["greedy_agreement"] == found["top1_agreement"] == 1.0
    assert found["skipped_experts_per_token"] == 0 and found["recall"] is None


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_compiling_meanwhile_voids_the_measurement(results: Results, evaluator: Evaluator) -> None:
    assert results, "it is prepared"
    other = torch.compile(lambda x: x + 1, backend="eager")
    with pytest.raises(CompileError, match="the measurement is void"):
        evaluator.measure(PolicyRun(policy="commit"), lambda step: other(torch.ones(1)))


def test_context_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave something"):
        _evaluator(tmp_path, windows=prompts(1, CONTEXT))


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (PolicyRun(), "exact"),
        (PolicyRun(policy="default_vector", threshold=0.05), "default_vector 0.05"),
        (PolicyRun(policy="commit"), "commit, predicted weights"),
        (
            PolicyRun(policy="commit", commit_weights="true", skip_layers=(0, 1)),
            "commit, true weights, skip 0,1",
        ),
    ],
)
def test_names_tell_policies_apart(run: PolicyRun, name: str) -> None:
    assert run.name == name


def test_sums_and_ratios() -> None:
    found = Fidelity(PolicyRun())
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    reference = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]))
    found.compare(logits, reference, torch.tensor([0, 0]))
    after = LayerStats(demand_bytes=30, speculative_bytes=10, hits=3, misses=1, skipped_experts=2)
    found.count(LayerStats(demand_bytes=10), after, tokens=2, ms=5.0)
    found.greedy_tokens, found.reference_tokens = [[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]
    ratios = found.as_dict()
    assert ratios["top1_agreement"] == 0.5
    # KL of the second row: 0.8 ln 8 + 0.1 ln 1 + 0.1 ln (1/8), over two tokens.
    assert ratios["kl_nats"] == pytest.approx(0.7 * 2.0794415 / 2, abs=1e-5)
    assert ratios["loss_increase_nats"] == pytest.approx(2.0794415 / 2, abs=1e-5)
    assert ratios["bytes_per_token"] == 15 and ratios["demand_bytes_per_token"] == 10
    assert ratios["hit_rate"] == 0.75 and ratios["skipped_experts_per_token"] == 1
    assert ratios["greedy_agreement"] == pytest.approx(5 / 6)
    assert ratios["greedy_same_prompts"] == 1 and ratios["greedy_first_difference"] == 2
