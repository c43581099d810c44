"""The expert kernels on a real GPU, at the sizes of real models, against plain torch.

Also what only a GPU can show: repeated runs give the same bits, late experts change none, nothing
waits for the device, and launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.compile_spec import MODEL_SHAPES, ModelShape
from benchmarks.kernels.variants.expert_mlp import form_of_shape
from specmoe_compile.kernels.blend_default_vectors.op import blend_default_vectors
from specmoe_compile.kernels.blend_default_vectors.reference import (
    blend_default_vectors_reference,
)
from specmoe_compile.kernels.correct_experts.op import correct_experts
from specmoe_compile.kernels.correct_experts.reference import correct_experts_reference
from specmoe_compile.kernels.expert_mlp.op import run_experts_decode, run_resident_experts
from specmoe_compile.kernels.expert_mlp.reference import (
    run_experts_decode_reference,
    run_resident_experts_reference,
)
from specmoe_compile.kernels.grouped_experts.op import reduce_choices, run_grouped_experts_
from specmoe_compile.kernels.grouped_experts.reference import (
    reduce_choices_reference,
    run_grouped_experts_reference,
)
from tests.kernels.expert_cases import DEVICE, FORMS, Case, make_case
from tests.kernels.gpu_cases import RUNS, no_synchronisation

pytestmark = pytest.mark.gpu

# Kernel and reference add in different orders and then round each choice's output to bfloat16: some
# land on the neighbouring number (2**-8 of it), and a token adds up to 8 of them, of size 1 to 4.
BF16 = {"rtol": 2**-6, "atol": 2**-4}


@pytest.fixture(params=MODEL_SHAPES, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return request.param


def make_model_case(shape: ModelShape, tokens: int) -> Case:
    """Random experts of a model's size; two more slots than a token uses."""
    return make_case(
        form_of_shape(shape),
        tokens=tokens,
        top_k=shape.top_k,
        slots=shape.top_k + 2,
        hidden=shape.hidden,
        inner=shape.intermediate,
        dtype=torch.bfloat16,
        bias=shape.has_bias,
    )


def decode(case: Case) -> Tensor:
    return run_experts_decode(case.x, case.slots, case.weights, case.bank, case.form)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_decode_matches_the_reference_and_itself(shape: ModelShape, tokens: int) -> None:
    case = make_model_case(shape, tokens)
    out = decode(case)
    expected = run_experts_decode_reference(case.x, case.slots, case.weights, case.bank, case.form)
    torch.testing.assert_close(out, expected, **BF16)
    with no_synchronisation():
        again = [decode(case) for _ in range(RUNS)]
    assert all(torch.equal(one, out) for one in again)


@pytest.mark.parametrize("tokens", [1, 4])
def test_late_experts_do_not_change_a_bit(shape: ModelShape, tokens: int) -> None:
    case = make_model_case(shape, tokens)
    expected = decode(case)
    for share in (0.0, 0.2, 0.5, 1.0):
        late = torch.rand(case.slots.shape, device=DEVICE) < share
        with no_synchronisation():
            resident, missing = case.slots.masked_fill(late, -1), case.slots.masked_fill(~late, -1)
            partial = run_resident_experts(case.x, resident, case.weights, case.bank, case.form)
            partial = partial.masked_fill(late.unsqueeze(-1), float("nan"))
            out = correct_experts(partial, case.x, missing, case.weights, case.bank, case.form)
        assert torch.equal(out, expected), share


def test_slots_of_either_integer_give_the_same_bits(shape: ModelShape) -> None:
    """A layer with every expert in its slot takes a router's int64, others a plan's int32."""
    case = make_model_case(shape, 1)
    at_once = [
        run_experts_decode(case.x, case.slots.to(dtype), case.weights, case.bank, case.form)
        for dtype in (torch.int32, torch.int64)
    ]
    assert torch.equal(*at_once)


def test_resident_outputs_match_the_reference(shape: ModelShape) -> None:
    case = make_model_case(shape, 2)
    case.slots[0, 0] = -1
    y = run_resident_experts(case.x, case.slots, case.weights, case.bank, case.form)
    expected = run_resident_experts_reference(case.x, case.slots, case.bank, case.form)
    torch.testing.assert_close(y, expected, **BF16)


def test_correction_matches_the_reference(shape: ModelShape) -> None:
    case = make_model_case(shape, 3)
    state = torch.randint(0, 3, case.slots.shape, device=DEVICE)
    partial = torch.randn(*case.slots.shape, shape.hidden, device=DEVICE).bfloat16()
    partial[state != 2] = float("nan")
    slots = case.slots.masked_fill(state != 0, -1)
    skipped = torch.randint_like(slots, shape.num_experts).masked_fill(state != 1, -1)
    defaults = torch.randn(shape.num_experts, shape.hidden, device=DEVICE)
    out = correct_experts(
        partial,
        case.x,
        slots,
        case.weights,
        case.bank,
        case.form,
        skipped=skipped,
        default_vectors=defaults,
    )
    expected = correct_experts_reference(
        partial, case.x, slots, case.weights, skipped, defaults, case.bank, case.form
    )
    torch.testing.assert_close(out, expected, **BF16)


def test_grouped_matches_the_reference_and_itself(shape: ModelShape) -> None:
    case = make_model_case(shape, 24)
    case.slots[5, 0] = -1
    y = torch.randn(*case.slots.shape, shape.hidden, device=DEVICE).bfloat16()
    expected = run_grouped_experts_reference(y, case.x, case.slots, case.bank, case.form)
    outs = [y.clone() for _ in range(RUNS)]
    with no_synchronisation():
        for out in outs:
            run_grouped_experts_(out, case.x, case.slots, case.bank, case.form)
    torch.testing.assert_close(outs[0], expected, **BF16)
    assert all(torch.equal(out, outs[0]) for out in outs)
    total = reduce_choices(outs[0], case.weights)
    torch.testing.assert_close(total, reduce_choices_reference(outs[0], case.weights), **BF16)


@pytest.mark.parametrize("tokens", [40, 700])
def test_grouped_parts_give_the_bits_of_one_call(tokens: int) -> None:
    case = make_case(FORMS["silu"], tokens=tokens, hidden=256, inner=192, dtype=torch.bfloat16)
    at_once = case.x.new_zeros(tokens, 2, 256)
    in_parts = at_once.clone()
    run_grouped_experts_(at_once, case.x, case.slots, case.bank, case.form)
    for part in ([0, 3], [1], [2, 4]):
        absent = ~torch.isin(case.slots, torch.tensor(part, device=DEVICE))
        slots = case.slots.masked_fill(absent, -1)
        run_grouped_experts_(in_parts, case.x, slots, case.bank, case.form)
    assert torch.equal(in_parts, at_once)


def test_blend_matches_the_reference(shape: ModelShape) -> None:
    ids = torch.randint(0, shape.num_experts, (7, shape.top_k), device=DEVICE)
    weights = torch.rand(7, shape.top_k, device=DEVICE).bfloat16()
    vectors = torch.randn(shape.num_experts, shape.hidden, device=DEVICE)
    with no_synchronisation():
        outs = [blend_default_vectors(ids, weights, vectors) for _ in range(RUNS)]
    expected = blend_default_vectors_reference(ids, weights, vectors, torch.float32)
    torch.testing.assert_close(outs[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_decode_replays_in_a_cuda_graph(shape: ModelShape) -> None:
    case = make_model_case(shape, 1)
    decode(case)  # compiles, which a capture must not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(case)
    for _ in range(3):
        case.x.normal_()
        case.slots.copy_(torch.randperm(shape.top_k + 2)[: shape.top_k])
        graph.replay()
        assert torch.equal(out, decode(case))
