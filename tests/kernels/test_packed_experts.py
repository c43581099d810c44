"""Kernels for coded experts against the float32 values of the codes in plain torch.

Kernels run on the GPU if there is one, else in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from specmoe_compile.kernels.correct_experts.op import correct_experts
from specmoe_compile.kernels.expert_mlp.op import run_experts_decode, run_resident_experts
from specmoe_compile.kernels.expert_mlp.reference import (
    run_experts_decode_reference,
    run_resident_experts_reference,
)
from specmoe_compile.kernels.grouped_experts import packed
from specmoe_compile.kernels.grouped_experts.op import run_grouped_experts_
from specmoe_compile.kernels.grouped_experts.reference import run_grouped_experts_reference
from specmoe_compile.kernels.packed_experts.expand import launch_expand, scales_apart
from specmoe_compile.runtime.experts.form import ExpertForm, part_of
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes, dequantise
from tests.kernels.expert_cases import DEVICE, FORMS, TOLERANCES, Case, nan_like, run_kernels
from tests.kernels.packed_cases import FORMATS, make_packed_case

GPT_OSS = FORMS["gpt_oss"]
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def assert_matches_reference(case: Case) -> torch.Tensor:
    """Both launches; returns the outputs of each choice."""
    y, out = run_kernels(case)
    expected_y = run_resident_experts_reference(case.x, case.slots, case.bank, case.form)
    expected = run_experts_decode_reference(case.x, case.slots, case.weights, case.bank, case.form)
    torch.testing.assert_close(y, expected_y, **TOLERANCES[case.x.dtype])
    torch.testing.assert_close(out, expected, **TOLERANCES[case.x.dtype])
    return y


def expanded(planes: WeightPlanes, code: Any, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Matrices of all slots but the last, which is not used."""
    slots, outputs = planes.codes.shape[:2]
    used = torch.ones(slots, dtype=torch.int32, device=DEVICE)
    used[-1] = 0
    matrix = nan_like(slots, outputs, inputs, dtype=dtype)
    launch_expand(planes, code, used, matrix)
    return matrix


@formats
def test_decode_matches_float32(format: Any) -> None:
    assert_matches_reference(make_packed_case(ExpertForm(), format))
    case = make_packed_case(GPT_OSS, format, tokens=2, dtype=torch.bfloat16, bias=True)
    case.slots[0, 1] = -1
    y = assert_matches_reference(case)
    assert not y[0, 1].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "hidden": 72, "inner": 8},
        {"tokens": 16, "hidden": 24, "inner": 8, "top_k": 1},
        {"tokens": 2, "hidden": 16, "inner": 8, "top_k": 4},
        {"tokens": 1, "hidden": 264, "inner": 136, "top_k": 3},
    ],
    ids=["one_token", "sixteen_tokens", "k_is_e", "several_tiles"],
)
@pytest.mark.parametrize("form", ["silu", "gpt_oss", "no_gate_relu2", "limited_after"])
@formats
def test_decode_takes_odd_sizes(format: Any, form: str, sizes: dict[str, int]) -> None:
    assert_matches_reference(make_packed_case(FORMS[form], format, **sizes))


@pytest.mark.parametrize("format", ["nvfp4", "fp8_block"])
def test_all_tokens_on_one_expert(format: str) -> None:
    case = make_packed_case(ExpertForm(), FORMATS[format], tokens=4, top_k=1)
    assert_matches_reference(dataclasses.replace(case, slots=torch.full_like(case.slots, 3)))


@formats
def test_every_code_is_worth_what_the_reference_says(format: Any) -> None:
    """All codes of the up projection's book, in every place of a word, to the last bit."""
    code = format.up
    bytes_ = torch.arange(256, dtype=torch.uint8).repeat(4).view(4, 256)
    if code.book == "e4m3":
        # 0x7f and 0xff are NaN, which the next test is about.
        bytes_ = bytes_.masked_fill((bytes_ & 0x7F) == 0x7F, 0)
    bytes_ = torch.stack([row.roll(shift) for shift, row in enumerate(bytes_)]).to(DEVICE)
    codes = bytes_.view(torch.int8) if code.book == "int8" else bytes_
    rows, inputs = 4, 512 if code.functions.bits == 4 else 256
    shapes = code.plane_shapes("w", rows, inputs, torch.float32)
    planes = WeightPlanes.of(
        {
            name: torch.ones(shape, device=DEVICE).to(dtype)
            for name, (shape, dtype) in shapes.items()
        }
        | {"w": codes},
        "w",
    )
    if code.scale == "e8m0":
        planes = planes._replace(scales=torch.full_like(planes.scales, 127))
    if code.scale == "e4m3":
        planes = planes._replace(scales=torch.full_like(planes.scales, 56))
    bank = WeightPlanes(*(None if plane is None else torch.stack([plane] * 2) for plane in planes))
    matrix = expanded(bank, code, inputs, torch.float32)
    assert torch.equal(matrix[0], dequantise(planes, code))
    assert matrix[1].isnan().all(), "a slot that is not used was written"


@formats
def test_matrices_hold_the_reference_to_the_bit(format: Any) -> None:
    case = make_packed_case(GPT_OSS, format, hidden=136, inner=72)
    for planes, code, inputs in (
        (case.bank.up_planes, format.up, 136),
        (case.bank.down_planes, format.down, 72),
    ):
        matrix = expanded(planes, code, inputs, torch.float32)
        for slot in range(3):
            assert torch.equal(matrix[slot], dequantise(part_of(planes, slot), code))
        assert scales_apart(planes, code, torch.float32) is None


def test_nan_codes_and_scales_are_nan() -> None:
    case = make_packed_case(ExpertForm(), FORMATS["fp8_block"])
    case.bank.up[:, 3, 5] = 0xFF
    case.bank.up[:, 4, 6] = 0x7F
    matrix = expanded(case.bank.up_planes, case.form.format.up, 40, torch.float32)
    assert matrix[0].isnan().nonzero().tolist() == [[3, 5], [4, 6]]
    for name in ("mxfp4", "nvfp4"):
        case = make_packed_case(ExpertForm(), FORMATS[name], hidden=64)
        assert case.bank.up_scales is not None
        case.bank.up_scales[:, 2, 0] = 255
        assert run_kernels(case)[1].isnan().all()


def _formats_and_dtypes() -> list[Any]:
    """Every format in float32, every second one in each of the others; the rest is slow."""
    return [
        pytest.param(
            format,
            dtype,
            id=f"{name}-{dtype}",
            marks=() if skips is None or number % 2 == skips else pytest.mark.slow,
        )
        for number, (name, format) in enumerate(FORMATS.items())
        for dtype, skips in ((torch.float32, None), (torch.bfloat16, 0), (torch.float16, 1))
    ]


@pytest.mark.parametrize(("format", "dtype"), _formats_and_dtypes())
def test_prefill_matches_float32(
    format: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two slots at a time, so that parts begin in the middle.
    sizes = {"hidden": 72, "inner": 40}
    monkeypatch.setattr(packed, "SCRATCH_BYTES", 2 * 3 * 72 * 40 * 4)
    case = make_packed_case(GPT_OSS, format, tokens=20, dtype=dtype, bias=True, **sizes)
    case.slots[3] = -1
    case.slots[case.slots == 1] = -1  # nobody's expert
    y = nan_like(20, 2, 72, dtype=dtype)
    packed.run_packed(y, case.x, case.slots, case.bank, case.form)
    before = nan_like(20, 2, 72, dtype=dtype)
    expected = run_grouped_experts_reference(before, case.x, case.slots, case.bank, case.form)
    torch.testing.assert_close(y, expected, equal_nan=True, **TOLERANCES[dtype])


@pytest.mark.parametrize("format", ["mxfp4", "int4_zeros"])
def test_late_experts_do_not_change_a_bit(format: str) -> None:
    case = make_packed_case(GPT_OSS, FORMATS[format], tokens=4, dtype=torch.bfloat16, bias=True)
    expected = run_kernels(case)[1]
    late = torch.tensor([[True, False], [False, False], [True, True], [False, True]], device=DEVICE)
    y, _ = run_kernels(dataclasses.replace(case, slots=case.slots.masked_fill(late, -1)))
    partial = y.masked_fill(late.unsqueeze(-1), float("nan"))
    missing = dataclasses.replace(case, slots=case.slots.masked_fill(~late, -1))
    assert torch.equal(run_kernels(missing, partial=partial)[1], expected)


@formats
def test_ops_match_the_reference(format: Any) -> None:
    case = make_packed_case(GPT_OSS, format, tokens=3, dtype=torch.bfloat16, bias=True)
    args = (case.slots, case.weights, case.bank, case.form)
    out = run_experts_decode(case.x, *args)
    expected = run_experts_decode_reference(case.x, *args)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.bfloat16])
    y = run_resident_experts(case.x, *args)
    late = torch.full_like(case.slots, -1)
    total = correct_experts(y, case.x, late, case.weights, case.bank, case.form)
    torch.testing.assert_close(total, out, **TOLERANCES[torch.bfloat16])
    grouped = run_grouped_experts_(nan_like(*y.shape, dtype=y.dtype), case.x, args[0], *args[2:])
    torch.testing.assert_close(grouped, y, **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("format", ["nvfp4", "int4_zeros"])
def test_ops_pass_opcheck(format: str) -> None:
    case = make_packed_case(GPT_OSS, FORMATS[format], bias=True)
    rest = (*case.bank, *case.form.as_args())
    ops = torch.ops.specmoe_kernels
    partial = torch.zeros(3, 2, 40, device=DEVICE)
    routing = (case.slots, case.weights)
    torch.library.opcheck(ops.run_experts_decode.default, (case.x, *routing, *rest))
    torch.library.opcheck(ops.run_resident_experts.default, (case.x, *routing, None, *rest))
    args = (partial, case.x, *routing, None, None, *rest)
    torch.library.opcheck(ops.correct_experts.default, args)
    torch.library.opcheck(ops.run_grouped_experts_.default, (partial, case.x, case.slots, *rest))


def test_wrong_planes_are_refused_with_one_sentence() -> None:
    case = make_packed_case(ExpertForm(), FORMATS["nvfp4"])
    bank = case.bank
    assert bank.up_scales is not None
    attempts: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "up_scales is missing", bank._replace(up_scales=None)),
        (ValueError, "up_zeros is given", bank._replace(up_zeros=bank.up_scales)),
        (
            TypeError,
            "up_scales is float32, expected uint8",
            bank._replace(up_scales=bank.up_global),
        ),
        (ValueError, "down_global is (4, 20)", bank._replace(down_global=bank.down_global[:, :20])),
        (ValueError, "expected [4, 48, 20]", bank._replace(up=bank.up[:, :, :16])),
        (ValueError, "expected multiples of 4", bank._replace(up=shifted(bank.up))),
    ]
    for error, message, wrong in attempts:
        with pytest.raises(error, match=re.escape(message)):
            run_experts_decode(case.x, case.slots, case.weights, wrong, case.form)
    narrow = make_packed_case(ExpertForm(), FORMATS["nvfp4"], hidden=36, inner=24)
    with pytest.raises(ValueError, match="up: a row has 36 codes of 4 bits"):
        run_experts_decode(narrow.x, narrow.slots, narrow.weights, narrow.bank, narrow.form)
    with pytest.raises(ValueError, match="row-major"):
        ExpertForm(transposed=True, format=FORMATS["nvfp4"])


def shifted(plane: torch.Tensor) -> torch.Tensor:
    """The same codes one byte further."""
    memory = torch.zeros(plane.numel() + 1, dtype=torch.uint8, device=plane.device)
    memory[1:] = plane.reshape(-1)
    return memory[1:].view(plane.shape)
