"""Kernels for coded experts at the sizes of models: values, repeated launches, graphs, prefill."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.compile_spec import PACKED_SHAPES, ModelShape
from benchmarks.kernels.variants.expert_mlp import form_of_shape
from specmoe_compile.kernels.correct_experts.op import correct_experts
from specmoe_compile.kernels.expert_mlp.op import run_experts_decode, run_resident_experts
from specmoe_compile.kernels.expert_mlp.reference import run_experts_decode_reference
from specmoe_compile.kernels.grouped_experts import packed
from specmoe_compile.kernels.grouped_experts.op import run_grouped_experts_
from specmoe_compile.kernels.grouped_experts.reference import run_grouped_experts_reference
from tests.kernels.expert_cases import DEVICE, Case
from tests.kernels.gpu_cases import RUNS, no_synchronisation
from tests.kernels.packed_cases import make_packed_case

pytestmark = pytest.mark.gpu

# See test_expert_mlp_gpu: outputs land on a neighbouring number, and a token adds up to 8 of them.
BF16 = {"rtol": 2**-6, "atol": 2**-4}


@pytest.fixture(params=PACKED_SHAPES, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return request.param


def make_model_case(shape: ModelShape, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Random coded experts of a model's size; two more slots than a token uses."""
    form = form_of_shape(shape)
    return make_packed_case(
        form,
        form.format,
        tokens=tokens,
        top_k=shape.top_k,
        slots=shape.top_k + 2,
        hidden=shape.hidden,
        inner=shape.intermediate,
        dtype=dtype,
        bias=shape.has_bias,
    )


def decode(case: Case) -> torch.Tensor:
    return run_experts_decode(case.x, case.slots, case.weights, case.bank, case.form)


@pytest.mark.parametrize("tokens", [1, 16])
def test_decode_matches_the_reference_and_itself(shape: ModelShape, tokens: int) -> None:
    case = make_model_case(shape, tokens)
    out = decode(case)
    expected = run_experts_decode_reference(case.x, case.slots, case.weights, case.bank, case.form)
    torch.testing.assert_close(out, expected, **BF16)
    with no_synchronisation():
        again = [decode(case) for _ in range(RUNS)]
    assert all(torch.equal(one, out) for one in again)


def test_float32_models_lose_nothing(shape: ModelShape) -> None:
    case = make_model_case(shape, 2, torch.float32)
    expected = run_experts_decode_reference(case.x, case.slots, case.weights, case.bank, case.form)
    error = (decode(case) - expected).norm() / expected.norm()
    assert error < 2e-6, error


def test_late_experts_do_not_change_a_bit(shape: ModelShape) -> None:
    case = make_model_case(shape, 2)
    expected = decode(case)
    for share in (0.0, 0.3, 1.0):
        late = torch.rand(case.slots.shape, device=DEVICE) < share
        with no_synchronisation():
            resident, missing = case.slots.masked_fill(late, -1), case.slots.masked_fill(~late, -1)
            partial = run_resident_experts(case.x, resident, case.weights, case.bank, case.form)
            partial = partial.masked_fill(late.unsqueeze(-1), float("nan"))
            out = correct_experts(partial, case.x, missing, case.weights, case.bank, case.form)
        assert torch.equal(out, expected), share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_prefill_matches_the_reference(
    shape: ModelShape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_model_case(shape, 24, dtype)
    case.slots[5, 0] = -1
    y = torch.zeros(*case.slots.shape, shape.hidden, device=DEVICE, dtype=dtype)
    expected = run_grouped_experts_reference(y, case.x, case.slots, case.bank, case.form)
    run_grouped_experts_(y, case.x, case.slots, case.bank, case.form)
    error = (y.float() - expected.float()).norm() / expected.float().norm()
    # Sums of 7168 products in another order are 2.5e-6 off in float32; a weight that was rounded to
    # 16 bits would be 1e-4 off or more.
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert error < bound, error
    # In parts of one slot: the bits of one call, without a wait.
    monkeypatch.setattr(packed, "SCRATCH_BYTES", 1)
    again = torch.zeros_like(y)
    with no_synchronisation():
        run_grouped_experts_(again, case.x, case.slots, case.bank, case.form)
    assert torch.equal(again, y)


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
