"""DeepSeek-V2-Lite's shape: a cache of latents, and routers that a table drives."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, StaticCache

from benchmarks.full_size.memory import attended_bytes, plain_bytes
from benchmarks.full_size.model import SHAPES, FilledCache, build_skeleton, cached_sizes
from benchmarks.full_size.routing import TracedDeepseekV2Router, install_routing
from benchmarks.full_size.trace import TRUE, near_uniform_tables


@torch.no_grad()
def test_the_cache_keeps_what_the_model_writes() -> None:
    config = SHAPES["tiny-deepseek"].configured()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    own = StaticCache(config=config, max_cache_len=64)
    model(torch.tensor([[1, 2, 3]]), past_key_values=own)
    filled = FilledCache(config, 32, 4, torch.device("cpu"), torch.float32)
    for mine, theirs in zip(filled.cache.layers, own.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape and mine.values.shape == theirs.values.shape
        assert int(mine.cumulative_length) == 32 and mine.keys.std() > 0.5
    assert cached_sizes(config) == (1, 32, 8)


def test_latents_take_a_small_part_of_what_keys_and_values_would() -> None:
    shape = SHAPES["DeepSeek-V2-Lite"]
    assert attended_bytes(shape.configured(), 65536, 2) == 27 * 65536 * (512 + 64) * 2
    # 15.7 billion parameters, of which the routed experts are 26 * 64 * 3 * 2048 * 1408.
    assert abs(plain_bytes(shape) / 2 - 1.31e9) < 0.05e9


@torch.no_grad()
def test_a_router_follows_its_table_or_itself() -> None:
    model, layers = build_skeleton(SHAPES["tiny-deepseek"], torch.device("cpu"))
    assert len(layers) == 2, "the first layer is dense"
    x = torch.randn(1, 1, 64)
    gates = [model.get_submodule(layer.name.rpartition(".")[0]).gate for layer in layers]
    for gate in gates:
        gate.weight.normal_(std=0.2)
    plain = [gate(x) for gate in gates]
    tables = near_uniform_tables(2, 5, 64, 4)
    routing = install_routing(model, layers, tables)
    assert all(type(gate) is TracedDeepseekV2Router for gate in gates)
    routing.start(False)
    for gate, (logits, weights, ids) in zip(gates, plain, strict=True):
        again = gate(x)
        assert torch.equal(again[0], logits) and torch.equal(again[1], weights)
        assert torch.equal(again[2], ids)
    routing.start(True, position=3)
    for layer, gate in enumerate(gates):
        wanted = tables[layer, 3, TRUE].topk(4).indices
        assert set(gate(x)[2][0].tolist()) == set(wanted.tolist())
