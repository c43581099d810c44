"""The C++ engine's kernels against float64 products of the dequantised weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.runtime.cpu.native import layer as native_layer
from specmoe_compile.runtime.cpu.native.layer import (
    NativeEngine,
    Task,
    expert_spec_or_reason,
)
from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.cpu.native.structures import ExpertSpec
from specmoe_compile.runtime.experts.formats.expert_format import (
    PLAIN_FORMAT,
    ExpertFormat,
    ExpertTensors,
)
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, dequantise
from specmoe_compile.runtime.experts.layout import ExpertLayout
from tests.runtime.experts.test_weight_code import ALL, INT4, INT8, MXFP4, NVFP4, random_planes

KERNELS = ("portable", "avx2", "avx512", "avx512_bf16")
# Whole vectors, tails of rows, a tail of one column, fewer columns than a vector has.
SIZES = ((64, 96), (48, 72), (33, 17), (8, 6))
INT4_BY_32 = WeightCode(book="int4", block=(1, 32), scale="f16")
INT4_ZEROS = WeightCode(book="int4", block=(1, 32), scale="f16", has_zero=True)
CODES = (
    *(code for code in ALL if code.book != "int4"),
    WeightCode(book="int4", block=(1, 64), scale="bf16"),
    INT4_BY_32,
    INT4_ZEROS,
)
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def engine(kernels: str, threads: int = 2) -> NativeEngine:
    library = library_or_none()
    if library is None:
        pytest.skip("no C++ compiler")
    try:
        return NativeEngine(library, threads, kernels)
    except SpecMoEError as error:
        pytest.skip(str(error))


def module(dtype: torch.dtype, gate: str = "silu") -> Any:
    """What a description asks of an experts module."""
    gates = {
        "silu": lambda h: functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        "gelu_tanh": lambda h: (
            functional.gelu(h.chunk(2, -1)[0], approximate="tanh") * h.chunk(2, -1)[1]
        ),
        "swiglu_oai": lambda h: (
            (h[..., 1::2].clamp(-7, 7) + 1)
            * (h[..., ::2].clamp(max=7) * torch.sigmoid(h[..., ::2].clamp(max=7) * 1.702))
        ),
    }
    found = {
        "has_gate": gate in gates,
        "is_transposed": False,
        "_apply_gate": gates.get(gate),
        "act_fn": {"relu2": lambda h: functional.relu(h).square(), "gelu": functional.gelu}.get(
            gate
        ),
    }
    if gate == "swiglu_oai":
        found |= {"alpha": 1.702, "limit": 7.0}
    return SimpleNamespace(**found)


class Experts:
    """Records of a few experts with random weights, and what they compute."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        format: ExpertFormat,
        dtype: torch.dtype,
        *,
        gate: str = "silu",
        bias: bool = False,
        count: int = 3,
    ) -> None:
        self.dtype, self.module, self.format = dtype, module(dtype, gate), format
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        rows = intermediate * (2 if self.module.has_gate else 1)
        shapes: dict[str, tuple[int, ...]] = {up: (rows, hidden)}
        if bias:
            shapes[f"{up}_bias"] = (rows,)
        shapes["down_proj"] = (hidden, intermediate)
        if bias:
            shapes["down_proj_bias"] = (hidden,)
        tensors = format.tensors(shapes, dict.fromkeys(shapes, dtype))
        self.layout = ExpertLayout.from_shapes(tensors, format)
        self.records = torch.full((count, self.layout.record_bytes), 0xFF, dtype=torch.uint8)
        for expert in range(count):
            views = self.layout.views(self.records[expert])
            generator = torch.Generator().manual_seed(expert)
            for name, code in ((up, format.up), ("down_proj", format.down)):
                if code.is_plain:
                    values = torch.randn(shapes[name], generator=generator)
                    views[name].copy_(values / math.sqrt(shapes[name][1]))
                else:
                    torch.manual_seed(expert)
                    for plane, value in random_planes(code, *shapes[name]).items():
                        views[plane.replace("w", name, 1)].copy_(value)
                if bias:
                    views[f"{name}_bias"].copy_(torch.randn(shapes[name][0], generator=generator))

    def spec(self, *, int8: bool = False) -> ExpertSpec:
        spec = expert_spec_or_reason(self.module, self.layout, self.dtype)
        assert isinstance(spec, ExpertSpec), spec
        spec.int8 = int8
        return spec

    def reference(self, expert: int, x: Tensor) -> Tensor:
        """[N, H] -> [N, H], float32: products in float64, rounded where torch rounds."""
        named = ExpertTensors.of(self.layout.views(self.records[expert]))

        def product(x: Tensor, planes: Any, code: WeightCode, bias: Tensor | None) -> Tensor:
            out = (x.double() @ dequantise(planes, code).double().t()).float()
            if code.is_plain:
                out = out.to(self.dtype)
            if bias is not None:
                out = out + bias
            return out.to(self.dtype)

        hidden = product(x, named.up, self.format.up, named.up_bias)
        owner = self.module
        hidden = owner._apply_gate(hidden) if owner.has_gate else owner.act_fn(hidden)
        return product(hidden, named.down, self.format.down, named.down_bias).float()


def run(
    engine: NativeEngine,
    experts: Experts,
    tokens: int,
    *,
    int8: bool = False,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every expert on every token: what came out [T, E, H], and the reference."""
    count = experts.records.shape[0]
    hidden = experts.spec().down.outputs
    if x is None:
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(9))
        x = x.to(experts.dtype)
    y = torch.full((tokens * count, hidden), math.nan)
    tasks = [
        Task(experts.records[e].data_ptr(), range(tokens), [t * count + e for t in range(tokens)])
        for e in range(count)
    ]
    engine.run(experts.spec(int8=int8), tasks, x.float(), y)
    engine.settle()  # late threads still read the records, which a test may drop first
    expected = torch.stack([experts.reference(e, x) for e in range(count)], dim=1)
    return y.view(tokens, count, hidden), expected


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the order of float32 sums; of half precision up to a neighbouring number, since
    a sum that falls between two may go either way."""
    unit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=unit, atol=unit * expected.abs().max().item())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_plain_weights(kernels: str, dtype: torch.dtype) -> None:
    tool = engine(kernels)
    for hidden, intermediate in SIZES:
        experts = Experts(hidden, intermediate, PLAIN_FORMAT, dtype, bias=hidden == 48)
        for tokens in (1, 2, 3, 5, 16):
            assert_close(*run(tool, experts, tokens), dtype)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("code", CODES, ids=lambda c: f"{c.book}-{c.scale}-{c.block}-{c.has_zero}")
def test_coded_weights(kernels: str, code: WeightCode) -> None:
    tool = engine(kernels)
    for hidden, intermediate in ((128, 256), (40, 136)):
        for dtype in (torch.float32, torch.bfloat16):
            experts = Experts(hidden, intermediate, ExpertFormat(up=code, down=code), dtype)
            for tokens in (1, 3):
                assert_close(*run(tool, experts, tokens), dtype)


@pytest.mark.parametrize("gate", ["gelu_tanh", "swiglu_oai", "relu2", "gelu"])
def test_gates(gate: str) -> None:
    for kernels in KERNELS[:2]:
        for dtype in PLAIN_DTYPES:
            experts = Experts(40, 24, PLAIN_FORMAT, dtype, gate=gate, bias=True)
            assert_close(*run(engine(kernels), experts, 2), dtype)


@pytest.mark.parametrize("format", ["plain", "mxfp4", "nvfp4", "int4", "zeros", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_instruction_sets_agree_to_the_bit(format: str, tokens: int) -> None:
    codes = {"mxfp4": MXFP4, "nvfp4": NVFP4, "int4": INT4_BY_32, "zeros": INT4_ZEROS}
    codes |= {"int8": INT8}
    code = codes.get(format)
    formats = PLAIN_FORMAT if code is None else ExpertFormat(up=code, down=code)
    for int8 in (False, True):
        for hidden, intermediate in ((96, 160), (256, 224)):
            experts = Experts(hidden, intermediate, formats, torch.bfloat16, bias=True)
            results = [run(engine(k), experts, tokens, int8=int8)[0] for k in KERNELS]
            for other in results[1:]:
                assert torch.equal(other, results[0])


@pytest.mark.parametrize("exponent", [-127, -120, -101, -100, 99, 100, 120, None])
def test_bfloat16_products_are_those_of_float32_at_every_size(exponent: int | None) -> None:
    # The instruction takes what is below float32's smallest normal number for zero.
    experts = Experts(128, 64, ExpertFormat(up=MXFP4, down=MXFP4), torch.bfloat16, gate="gelu")
    for record in experts.records:
        # Scales by which the hidden values are of order one again.
        experts.layout.views(record)["up_proj_scales"].fill_(127 - (exponent or 0))
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = x * 2.0**exponent if exponent is not None else x.where(x < 1, math.inf)
    got, expected = (run(engine(k), experts, 1, x=x)[0] for k in ("avx512_bf16", "avx512"))
    assert expected.isnan().any() == (exponent is None) and (expected != 0).any()
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("code", [c for c in CODES if c.book in ("e2m1", "int4", "int8")], ids=str)
def test_int8_activations_err_by_their_rounding_alone(kernels: str, code: WeightCode) -> None:
    for sizes in ((128, 256), (96, 160)):  # whole groups of 128 columns, and parts of one
        experts = Experts(*sizes, ExpertFormat(up=code, down=code), torch.float32)
        for tokens in (1, 3):
            got, expected = run(engine(kernels), experts, tokens, int8=True)
            error = (got - expected).norm() / expected.norm()
            assert 1e-5 < error < 0.02  # 1 in 254 of the largest of 32, twice


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_e8m0_scale_is_its_power_of_two(kernels: str) -> None:
    experts = Experts(256, 32, ExpertFormat(up=MXFP4, down=MXFP4), torch.float32, gate="relu2")
    for record in experts.records:
        views = experts.layout.views(record)
        views["down_proj"].fill_(0x22)  # ones
        scales = views["down_proj_scales"]  # one per row
        scales.copy_(torch.arange(256).to(torch.uint8).view(scales.shape))
    got, expected = run(engine(kernels), experts, 1)
    assert expected.isnan().sum() == len(experts.records) and (expected != 0).all()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-43, equal_nan=True)


def test_threads_and_chunks_change_no_bit() -> None:
    experts = Experts(256, 1024, PLAIN_FORMAT, torch.float32, count=4)
    one, _ = run(engine("portable", 1), experts, 3)
    four = engine("portable", 4)
    for _ in range(20):
        assert torch.equal(run(four, experts, 3)[0], one)


def test_what_the_kernels_do_not_have_is_said() -> None:
    experts = Experts(64, 64, PLAIN_FORMAT, torch.float32)
    owner = experts.module
    assert "torch.float64" in str(expert_spec_or_reason(owner, experts.layout, torch.float64))
    coded = Experts(64, 64, ExpertFormat(up=INT4, down=INT4), torch.float32)
    assert "8 inputs" in str(expert_spec_or_reason(coded.module, coded.layout, torch.float32))
    owner.is_transposed = True
    assert "transposed" in str(expert_spec_or_reason(owner, experts.layout, torch.float32))
    owner.is_transposed, owner.has_post_expert_norm = False, True
    assert "normalised" in str(expert_spec_or_reason(owner, experts.layout, torch.float32))


def test_small_experts_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts(64, 64, PLAIN_FORMAT, torch.float32)
    arguments = (experts.module, experts.layout, torch.float32)
    assert native_layer.native_layer_or_none(*arguments) is None
    monkeypatch.setattr(native_layer, "MIN_RECORD_BYTES", 0)
    assert (native_layer.native_layer_or_none(*arguments) is None) == (library_or_none() is None)
