"""A real GPU gives the plain model's tokens by either transfer, from memory that it returns."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import specmoe_compile
from specmoe_compile.hf.attach import session_of
from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from tests.helpers import greedy, prompts, tiny_qwen3_moe
from tests.runtime.cuda.device_models import decide_trials

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "gather": {"prefetch": True, "transfer": "gather"},
    "copy": {"prefetch": True, "transfer": "copy"},
    "auto": {"prefetch": True},
    "copy, two ahead": {"transfer": "copy", "lookahead": 2},
    "gather, graph": {"prefetch": True, "mode": "reduce-overhead"},
    "gather, graph, products": {"prefetch": True, "mode": "reduce-overhead", "products": True},
    "gather, graph, as it comes": {"mode": "reduce-overhead"},
}


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_qwen3_moe().cuda()


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_the_plain_model(
    name: str, batch: int, length: int, plain: Any
) -> None:
    ids = prompts(batch, length).cuda()
    static = {"cache_implementation": "static"} if "graph" in name else {}
    expected = greedy(plain, ids, 16, **static)
    model = specmoe_compile.offload(
        copy.deepcopy(plain), device="cuda", store="ram", expert_cache="50%", progress=False
    )
    session: Any = session_of(model)
    for bank in session.engine.cache.banks:
        bank.fill_(255)  # NaN in every float type: a slot that is read before it is filled shows
    compiled = torch.compile(model, backend="specmoe", options=OPTIONS[name])
    for _ in range(2):
        assert torch.equal(greedy(compiled, ids, 16, **static), expected)
    if name == "auto":
        rates = session.engine.transfer_rates
        assert min(rates.copy_gbps, rates.gather_gbps) > 0
        assert session.engine.transfer == rates.faster
    region = session.store.region
    assert region.is_pinned()
    specmoe_compile.close(model)
    assert not region.is_pinned()


@pytest.mark.parametrize("pays", [True, False])
def test_copied_steps_in_branches_give_the_plain_models_tokens(
    pays: bool, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide_trials(monkeypatch, predicts=pays)
    ids = prompts(1, 5).cuda()
    expected = greedy(plain, ids, 16)
    model = specmoe_compile.offload(
        copy.deepcopy(plain), device="cuda", store="ram", expert_cache="50%", progress=False
    )
    session: Any = session_of(model)
    compiled = torch.compile(
        model, backend="specmoe", options={"prefetch": True, "transfer": "copy"}
    )
    greedy(compiled, ids, 2)
    assert session.engine.plans_steps
    session.reset_stats()
    assert torch.equal(greedy(compiled, ids, 16), expected)
    assert (session.stats.total.speculative_bytes > 0) == pays
    specmoe_compile.close(model)


def test_committed_tokens_depend_on_no_transfer_and_no_graph(plain: Any) -> None:
    ids = prompts(1, 5).cuda()
    # A router on the residual stream learns nothing on the way.
    commit = {"policy": "commit", "predictor": "residual"}
    tokens, left_out = [], []
    for options in ({"transfer": "copy"}, {"transfer": "gather"}, {"mode": "reduce-overhead"}):
        model = specmoe_compile.offload(
            copy.deepcopy(plain), device="cuda", store="ram", expert_cache="50%", progress=False
        )
        compiled = torch.compile(model, backend="specmoe", options={**commit, **options})
        for _ in range(2):
            generated = greedy(compiled, ids, 16, cache_implementation="static")
        tokens.append(generated)
        left_out.append(session_of(model).stats.total.skipped_experts)
        specmoe_compile.close(model)
    assert left_out[0] == left_out[1] == left_out[2] > 0
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prefetch", [True, False])
def test_experts_on_disk_give_the_plain_models_tokens(
    prefetch: bool, batch: int, plain: Any, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path / "model")
    ids = prompts(batch, 40).cuda()
    expected = greedy(plain, ids, 16, cache_implementation="static")
    model = specmoe_compile.from_pretrained(
        str(tmp_path / "model"),
        device="cuda",
        store="disk",
        store_dir=tmp_path / "store",
        expert_cache="50%",
        progress=False,
    )
    session: Any = session_of(model)
    for bank in session.engine.cache.banks:
        bank.fill_(255)
    compiled = torch.compile(
        model, backend="specmoe", options={"prefetch": prefetch, "auto_off": False}
    )
    for _ in range(2):
        assert torch.equal(greedy(compiled, ids, 16, cache_implementation="static"), expected)
    assert session.engine.transfer == "copy"
    total = session.stats.total
    if batch == 1:  # three tokens choose more experts than there are slots
        assert total.hits > 0
        assert total.demand_bytes > 0
        assert (total.speculative_bytes > 0) == prefetch
    specmoe_compile.close(model)


def counted_generation(plain: Any, store: dict[str, Any], ids: Any, **options: Any) -> Any:
    """Tokens of the second of two generations, its counters, and whether graphs recorded."""
    model = specmoe_compile.offload(copy.deepcopy(plain), device="cuda", progress=False, **store)
    compiled = torch.compile(model, backend="specmoe", options=options)
    greedy(compiled, ids, 16, cache_implementation="static")
    filled_bytes = specmoe_compile.stats(model).total.filled_bytes
    session_of(model).reset_stats()
    tokens = greedy(compiled, ids, 16, cache_implementation="static")
    stats = specmoe_compile.stats(model)
    specmoe_compile.close(model)
    return tokens, stats, filled_bytes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("store", ["ram", "disk"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_every_expert_in_its_slot_gives_the_plain_models_tokens_without_a_miss(
    mode: str, store: str, length: int, batch: int, plain: Any, tmp_path: Path
) -> None:
    ids = prompts(batch, length).cuda()
    kept: dict[str, Any] = {"store": store, "expert_cache": "100%"}
    if store == "disk":
        kept["store_dir"] = tmp_path / "store"
    tokens, stats, filled_bytes = counted_generation(plain, kept, ids, mode=mode)
    assert torch.equal(tokens, greedy(plain, ids, 16, cache_implementation="static"))
    total = stats.total
    assert (total.misses, total.demand_bytes, total.prefetches) == (0, 0, 0)
    assert filled_bytes == stats.store_bytes
    assert total.steps > 0 and total.hits >= total.steps


def test_replayed_steps_without_a_plan_are_counted_as_planned_ones_are(plain: Any) -> None:
    ids, options = prompts(1, 40).cuda(), {"mode": "reduce-overhead", "prefetch": False}
    uses = []
    for size in ("50%", "100%"):
        kept = {"store": "ram", "expert_cache": size}
        _, stats, _ = counted_generation(plain, kept, ids, **options)
        uses.append([(layer.steps, layer.hits + layer.misses) for layer in stats.layers])
    assert uses[0] == uses[1]


def test_slots_and_spare_places_are_used_as_the_python_policy_says(plain: Any) -> None:
    model = specmoe_compile.offload(
        copy.deepcopy(plain), device="cuda", store="ram", expert_cache="50%", progress=False
    )
    session, generator = session_of(model), random.Random(0)
    session.configure(SessionOptions(transfer="gather"))
    layers = [layer.mlp.experts for layer in plain.model.layers]
    counts = [len(layer.gate_up_proj) for layer in layers]
    cache: Any = session.engine.cache  # type: ignore[attr-defined]
    policy = ExpertCache(num_experts=counts, slots=cache.slots, policy="adaptive", spare=2)
    bypassed = 0
    for number in range(150):
        layer = number % len(layers)
        first = generator.choice([0, 1, 2, 3] if generator.random() < 0.7 else range(counts[layer]))
        second = generator.choice([e for e in range(counts[layer]) if e != first])
        x = torch.randn(1, plain.config.hidden_size, device="cuda")
        ids = torch.tensor([[first, second]], device="cuda")
        weights = torch.tensor([[0.75, 0.25]], device="cuda")
        bypassed += len(policy.plan(layer, [first, second]).bypassed)
        out = session.experts(layer, x, ids, weights)
        torch.testing.assert_close(out, layers[layer](x, ids, weights), rtol=1e-4, atol=1e-4)
        assert cache.tables[layer].expert_of.tolist() == list(policy.expert_of[layer]), number
    assert bypassed > 10
    specmoe_compile.close(model)
