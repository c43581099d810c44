"""The bytes that `variants` modules claim are those that the kernels load and store, lane by lane.

Counted in Triton's interpreter: every address of every load and store whose mask is true.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from benchmarks.kernels.compile_spec import MODEL_SHAPES, ModelShape, Traffic
from benchmarks.kernels.variants import blend_default_vectors as blend_variants
from benchmarks.kernels.variants import correct_experts as correct_variants
from benchmarks.kernels.variants import expert_mlp as decode_variants
from benchmarks.kernels.variants import gather_experts as gather_variants
from benchmarks.kernels.variants import grouped_experts as grouped_variants
from benchmarks.kernels.variants import plan_cache as plan_variants
from specmoe_compile.kernels.blend_default_vectors.kernel import launch_weighted_sum
from specmoe_compile.kernels.expert_mlp.launch import launch_down, launch_gate_up
from specmoe_compile.kernels.gather_experts.kernel import launch_gather
from specmoe_compile.kernels.grouped_experts.config import block_m
from specmoe_compile.kernels.grouped_experts.launch import launch_grouped
from specmoe_compile.kernels.grouped_experts.plan import plan_tiles
from specmoe_compile.kernels.plan_cache.kernel import launch_plan
from specmoe_compile.kernels.plan_cache.op import COUNTERS, MAX_CHOICES
from specmoe_compile.runtime.cache.eviction import CANDIDATES
from tests.kernels.expert_cases import Case, make_case, nan_like

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter"
)

SHAPES = [
    ModelShape(name="plain", hidden=24, intermediate=20, num_experts=4, top_k=3, dtype="bf16"),
    ModelShape(
        name="gpt_oss",
        hidden=40,
        intermediate=18,
        num_experts=3,
        top_k=2,
        dtype="fp32",
        has_bias=True,
        interleaved=True,
        transposed=True,
        activation="swiglu_oai",
    ),
    ModelShape(
        name="no_gate",
        hidden=33,
        intermediate=70,
        num_experts=5,
        top_k=1,
        dtype="fp16",
        has_gate=False,
        activation="relu2",
    ),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Counter:
    """Addresses that were loaded and stored, with the bytes of one element."""

    def __init__(self) -> None:
        self.loads: list[tuple[np.ndarray, int]] = []
        self.stores: list[tuple[np.ndarray, int]] = []

    def assert_equals(self, traffic: Traffic) -> None:
        loaded = sum(addresses.size * size for addresses, size in self.loads)
        stored = sum(addresses.size * size for addresses, size in self.stores)
        assert self._distinct(self.stores) == stored
        assert self._distinct(self.loads) + stored == traffic.needed_bytes
        assert loaded + stored == traffic.moved_bytes + traffic.reread_bytes

    @staticmethod
    def _distinct(accesses: list[tuple[np.ndarray, int]]) -> int:
        sizes = {size for _, size in accesses}
        return sum(
            size * len(np.unique(np.concatenate([a for a, s in accesses if s == size])))
            for size in sizes
        )


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Counter]]:
    """Returns a function that starts a fresh count."""
    current = [Counter()]
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def record(accesses: list[tuple[np.ndarray, int]], ptrs: Any, mask: Any) -> None:
        size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        accesses.append((ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)], size))

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        record(current[0].loads, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record(current[0].stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def start() -> Counter:
        current[0] = Counter()
        return current[0]

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    yield start


def make_even_case(shape: ModelShape, tokens: int) -> Case:
    """Choices spread evenly over the experts, as the counts assume."""
    case = make_case(
        decode_variants.form_of_shape(shape),
        tokens=tokens,
        top_k=shape.top_k,
        slots=shape.num_experts,
        hidden=shape.hidden,
        inner=shape.intermediate,
        dtype=DTYPES[shape.dtype],
        bias=shape.has_bias,
    )
    choices = torch.arange(tokens * shape.top_k, dtype=torch.int32) % shape.num_experts
    return dataclasses.replace(case, slots=choices.view(tokens, shape.top_k))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_decode_moves_what_it_claims(
    shape: ModelShape, tokens: int, count: Callable[[], Counter]
) -> None:
    case = make_even_case(shape, tokens)
    intermediate = torch.zeros(tokens, shape.top_k, shape.intermediate, dtype=case.x.dtype)
    counter = count()
    launch_gate_up(case.x, case.slots, case.bank, case.form, intermediate)
    traffic = decode_variants.gate_up_spec(shape, tokens).traffic
    assert traffic is not None
    counter.assert_equals(traffic)
    counter = count()
    out = nan_like(tokens, shape.hidden, dtype=case.x.dtype)
    launch_down(intermediate, case.slots, case.weights, case.bank, case.form, out)
    traffic = decode_variants.down_spec(shape, tokens).traffic
    assert traffic is not None
    counter.assert_equals(traffic)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_correction_moves_what_it_claims(shape: ModelShape, count: Callable[[], Counter]) -> None:
    case = make_even_case(shape, 1)
    case.slots[0, 1:] = -1
    gate_up, down = correct_variants.compile_specs(shape)
    assert gate_up.traffic is not None and down.traffic is not None
    intermediate = torch.zeros(1, shape.top_k, shape.intermediate, dtype=case.x.dtype)
    counter = count()
    launch_gate_up(case.x, case.slots, case.bank, case.form, intermediate)
    counter.assert_equals(gate_up.traffic)
    counter = count()
    partial = torch.zeros(1, shape.top_k, shape.hidden, dtype=case.x.dtype)
    out = nan_like(1, shape.hidden, dtype=case.x.dtype)
    launch_down(intermediate, case.slots, case.weights, case.bank, case.form, out, partial=partial)
    counter.assert_equals(down.traffic)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_grouped_moves_what_it_claims(
    shape: ModelShape, tokens: int, count: Callable[[], Counter]
) -> None:
    case = make_even_case(shape, tokens)
    rows = block_m(case.slots.numel(), shape.num_experts, shape.itemsize)
    plan = plan_tiles(case.slots, shape.num_experts, rows)
    intermediate = torch.zeros(case.slots.numel(), shape.intermediate, dtype=case.x.dtype)
    y = torch.zeros(tokens, shape.top_k, shape.hidden, dtype=case.x.dtype)
    counter = count()
    launch_grouped(case.x, case.bank, case.form, plan, rows, intermediate, y)
    both = [
        spec(shape, tokens, rows).traffic
        for spec in (grouped_variants.gate_up_spec, grouped_variants.down_spec)
    ]
    first, second = (traffic for traffic in both if traffic is not None)
    # Both launches are counted together: what the second reads, the first has read or written too.
    loaded = sum(addresses.size * size for addresses, size in counter.loads)
    stored = sum(addresses.size * size for addresses, size in counter.stores)
    claimed = [traffic.moved_bytes + traffic.reread_bytes for traffic in (first, second)]
    assert loaded + stored == sum(claimed)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_weighted_sum_moves_what_it_claims(
    shape: ModelShape, gather: bool, count: Callable[[], Counter]
) -> None:
    dtype = DTYPES[shape.dtype]
    traffic = blend_variants.weighted_sum_spec(shape, 1, gather=gather).traffic
    assert traffic is not None
    rows = torch.randn(shape.num_experts, shape.hidden, dtype=torch.float32 if gather else dtype)
    ids = torch.arange(shape.top_k).view(1, -1)
    weights = torch.rand(1, shape.top_k).to(dtype)
    counter = count()
    launch_weighted_sum(
        rows if gather else rows[: shape.top_k],
        ids if gather else None,
        weights,
        nan_like(1, shape.hidden, dtype=dtype),
    )
    counter.assert_equals(traffic)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_plan_without_misses_moves_what_it_claims(
    shape: ModelShape, count: Callable[[], Counter]
) -> None:
    traffic = plan_variants.plan_spec(shape, 1, policy="lru").traffic
    assert traffic is not None
    slots, choices = plan_variants.slots_of_shape(shape), shape.top_k
    holds = torch.arange(slots, dtype=torch.int32)
    slot_of = torch.full((shape.num_experts,), -1, dtype=torch.int32)
    slot_of[:slots] = holds
    counter = count()
    launch_plan(
        torch.arange(choices).view(1, -1),
        slot_of,
        holds.clone(),
        torch.zeros(slots, dtype=torch.int64),
        torch.zeros(CANDIDATES, shape.num_experts, dtype=torch.int64),
        *(torch.zeros(slots, dtype=torch.int32) for _ in range(2)),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(CANDIDATES + 1, dtype=torch.int64),
        torch.zeros(len(COUNTERS), dtype=torch.int64),
        *(torch.zeros(1, choices, dtype=torch.int32) for _ in range(2)),
        *(torch.zeros(min(choices, shape.num_experts), dtype=torch.int32) for _ in range(2)),
        torch.zeros(1, dtype=torch.int32),
        policy="lru",
        speculative=False,
        max_fills=MAX_CHOICES,
    )
    counter.assert_equals(traffic)


@pytest.mark.parametrize("fills", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_gather_moves_what_it_claims(
    shape: ModelShape, fills: int, count: Callable[[], Counter]
) -> None:
    traffic = gather_variants.gather_spec(shape, fills, programs=3).traffic
    assert traffic is not None
    size = gather_variants.record_bytes_of_shape(shape)
    source = torch.randint(0, 256, (shape.num_experts, size), dtype=torch.uint8)
    target = torch.zeros(2, size, dtype=torch.uint8)
    experts, slots = (torch.arange(2, dtype=torch.int32) for _ in range(2))
    number = torch.tensor([fills], dtype=torch.int32)
    counter = count()
    launch_gather([source], [target], experts, slots, number, programs=3)
    counter.assert_equals(traffic)
    assert torch.equal(target[:fills], source[:fills])


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
def test_no_launch_moves_five_percent_in_vain(shape: ModelShape) -> None:
    modules = (
        *(blend_variants, correct_variants, decode_variants),
        *(gather_variants, grouped_variants, plan_variants),
    )
    specs = [spec for module in modules for spec in module.compile_specs(shape)]
    assert len({spec.label for spec in specs}) == len(specs)
    for spec in specs:
        assert spec.traffic is None or 0 <= spec.traffic.excess < 0.05, spec.label


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
def test_one_token_reads_little_again(shape: ModelShape) -> None:
    for spec in decode_variants.compile_specs(shape):
        if spec.label.endswith("T=1"):
            assert spec.traffic is not None
            assert spec.traffic.reread_bytes <= spec.traffic.needed_bytes / 3, spec.label
