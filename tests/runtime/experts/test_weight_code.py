"""What codes are worth, which planes a weight has, and the float32 reference of their product."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from specmoe_compile.runtime.experts.formats.code_books import (
    CODE_BOOKS,
    E2M1_VALUES,
    NF4_VALUES,
    pack_nibbles,
    unpack_nibbles,
)
from specmoe_compile.runtime.experts.formats.weight_code import (
    SCALE_DTYPES,
    WeightCode,
    WeightPlanes,
    decode_scales,
    dequantise,
)
from specmoe_compile.runtime.experts.layout import ExpertLayout

MXFP4 = WeightCode(book="e2m1", block=(1, 32), scale="e8m0")
NVFP4 = WeightCode(book="e2m1", block=(1, 16), scale="e4m3", has_global=True)
INT4 = WeightCode(book="int4", block=(1, 8), scale="bf16")
INT4_ZEROS = WeightCode(book="int4", block=(1, 8), scale="f16", has_zero=True)
NF4 = WeightCode(book="nf4", block=(1, 64), scale="f32")
FP8_BLOCK = WeightCode(book="e4m3", block=(128, 128), scale="f32")
FP8_CHANNEL = WeightCode(book="e4m3", block=(1, 0), scale="f32")
FP8_TENSOR = WeightCode(book="e4m3", block=(0, 0), scale="bf16")
INT8 = WeightCode(book="int8", block=(1, 0), scale="f32")
ALL = (MXFP4, NVFP4, INT4, INT4_ZEROS, NF4, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT8)


def random_planes(code: WeightCode, outputs: int, inputs: int) -> Mapping[str, torch.Tensor]:
    """Every plane of a weight `w`, in one record, filled with finite numbers."""
    generator = torch.Generator().manual_seed(0)
    layout = ExpertLayout.from_shapes(code.plane_shapes("w", outputs, inputs, torch.float32))
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    views = layout.views(record)
    for name, view in views.items():
        if name == "w":
            # 0..125: for e4m3, everything but the two NaNs and the negative half.
            view.copy_(torch.randint(126, view.shape, generator=generator))
        elif name == "w_scales" and code.scale == "e8m0":
            view.copy_(torch.randint(120, 130, view.shape, generator=generator))
        elif name == "w_scales" and code.scale == "e4m3":
            view.copy_(torch.randint(1, 126, view.shape, generator=generator))
        elif name == "w_zeros":
            view.copy_(torch.randint(0, 17, view.shape, generator=generator))
        else:
            view.copy_(torch.rand(view.shape, generator=generator) + 0.5)
    return views


def value_by_hand(code: WeightCode, views: Mapping[str, torch.Tensor], n: int, k: int) -> float:
    """One weight, from the definition of its format; written without the package's functions."""
    raw = views["w"]
    if code.book in ("e2m1", "int4", "nf4"):
        nibble = (int(raw[n, k // 2]) >> (4 * (k % 2))) & 15
        zero = 8
        if code.has_zero:
            zero = int(views["w_zeros"][n // code.block[0], k // code.block[1]])
        value = {
            "e2m1": E2M1_VALUES[nibble & 7] * (-1 if nibble & 8 else 1),
            "int4": float(nibble - zero),
            "nf4": NF4_VALUES[nibble],
        }[code.book]
    elif code.book == "e4m3":
        byte = int(raw[n, k])
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        value = (mantissa / 8 if exponent == 0 else 1 + mantissa / 8) * 2.0 ** max(exponent - 7, -6)
        value = -value if byte & 128 else value
    else:
        value = float(raw[n, k])
    rows, columns = code.block
    scale = views["w_scales"][n // rows if rows else 0, k // columns if columns else 0]
    factor = float(scale)
    if code.scale == "e8m0":
        factor = 2.0 ** (int(scale) - 127)
    elif code.scale == "e4m3":
        factor = float(scale.view(torch.float8_e4m3fn).float())
    out = torch.tensor(value, dtype=torch.float32) * torch.tensor(factor, dtype=torch.float32)
    if code.has_global:
        out = out * views["w_global"][n]
    return float(out)


@pytest.mark.parametrize("code", ALL, ids=lambda c: f"{c.book}-{c.scale}-{c.block}-{c.has_zero}")
def test_dequantised_planes_are_the_definition(code: WeightCode) -> None:
    outputs, inputs = 130, 192  # more than one block of 128 x 128, and the last ones cut
    views = random_planes(code, outputs, inputs)
    values = dequantise(WeightPlanes.of(views, "w"), code)
    assert values.shape == (outputs, inputs)
    assert values.dtype == torch.float32
    for n in (0, 1, 127, 128, 129):
        for k in (0, 1, 15, 16, 31, 32, 127, 128, 191):
            assert float(values[n, k]) == value_by_hand(code, views, n, k)


@pytest.mark.parametrize("code", ALL, ids=lambda c: f"{c.book}-{c.scale}-{c.block}-{c.has_zero}")
def test_a_bank_of_records_is_dequantised_at_once(code: WeightCode) -> None:
    layout = ExpertLayout.from_shapes(code.plane_shapes("w", 6, 64, torch.float32))
    bank = torch.zeros(3, layout.record_bytes, dtype=torch.uint8)
    for slot in range(3):
        for name, view in layout.views(bank[slot]).items():
            view.copy_(random_planes(code, 6, 64)[name] if slot != 1 else 1)
    values = dequantise(WeightPlanes.of(layout.bank_views(bank), "w"), code)
    for slot in range(3):
        one = dequantise(WeightPlanes.of(layout.views(bank[slot]), "w"), code)
        assert torch.equal(values[slot], one)


def test_low_nibble_is_the_even_column() -> None:
    packed = pack_nibbles(torch.tensor([[1, 2, 15, 0]]))
    assert packed.tolist() == [[0x21, 0x0F]]
    assert unpack_nibbles(packed).tolist() == [[1, 2, 15, 0]]


@pytest.mark.parametrize("book", ["e2m1", "int4", "nf4", "e4m3", "int8"])
def test_encoding_a_code_gives_it_back(book: str) -> None:
    functions = CODE_BOOKS[book]
    codes = torch.arange(-127, 128) if book == "int8" else torch.arange(256)
    if book == "e4m3":
        codes = codes[(codes & 127) != 127]  # NaN
    codes = codes.to(functions.dtype or torch.uint8)
    assert torch.equal(functions.encode(functions.decode(codes)), codes)


@pytest.mark.parametrize("book", ["e2m1", "int4", "nf4", "e4m3", "int8"])
def test_encoding_picks_the_nearest_code_and_saturates(book: str) -> None:
    functions = CODE_BOOKS[book]
    everything = torch.arange(-127, 128) if book == "int8" else torch.arange(256)
    table = functions.decode(everything.to(functions.dtype or torch.uint8)).flatten()
    table = table[table.isfinite()]
    values = torch.linspace(-1.3, 1.3, 999) * functions.largest
    values = torch.cat((values, torch.zeros(1)))
    got = functions.decode(functions.encode(values))
    assert torch.equal(functions.nearest(values), got)
    best = (table[:, None] - values).abs().min(dim=0).values
    torch.testing.assert_close((got - values).abs(), best, rtol=0, atol=1e-6)


def test_a_tie_of_e2m1_goes_to_the_even_code() -> None:
    functions = CODE_BOOKS["e2m1"]
    got = functions.decode(functions.encode(torch.tensor([0.25, 0.75, 1.75, 2.5, -3.5, 5.0])))
    assert got.tolist() == [0.0, 1.0, 2.0, 2.0, -4.0, 4.0]


def test_scales_of_bytes_are_exact_down_to_the_last_one() -> None:
    powers = decode_scales(torch.arange(256, dtype=torch.uint8), "e8m0")
    assert powers[:255].tolist() == [2.0 ** (s - 127) for s in range(255)]
    assert math.isnan(powers[255])


def test_planes_are_named_after_the_weight() -> None:
    planes = NVFP4.plane_shapes("gate_up_proj", 8, 64, torch.bfloat16)
    assert planes == {
        "gate_up_proj": ((8, 32), torch.uint8),
        "gate_up_proj_scales": ((8, 4), torch.uint8),
        "gate_up_proj_global": ((8,), torch.float32),
    }
    assert WeightCode().plane_shapes("w", 8, 64, torch.bfloat16) == {"w": ((8, 64), torch.bfloat16)}
    assert INT4_ZEROS.plane_shapes("w", 4, 20, torch.float32)["w_zeros"] == ((4, 3), torch.uint8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"book": "e5m2"}, "book"),
        ({"book": "int4"}, "scales"),
        ({"scale": "f32"}, "scales"),
        ({"book": "int4", "scale": "f64"}, "scale"),
        ({"book": "e4m3", "scale": "f32", "has_zero": True}, "zeros"),
        ({"has_global": True}, "global"),
        ({"book": "int8", "scale": "f32", "block": (1, -1)}, "block"),
    ],
)
def test_a_code_that_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightCode(**settings)  # type: ignore[arg-type]


def test_half_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        INT4.plane_shapes("w", 4, 7, torch.float32)


@pytest.mark.parametrize("code", [*ALL, WeightCode()], ids=repr)
def test_a_code_survives_json(code: WeightCode) -> None:
    assert WeightCode.from_json(code.to_json()) == code


def test_every_kind_of_scale_has_a_plane() -> None:
    for kind, dtype in SCALE_DTYPES.items():
        assert decode_scales(torch.ones(2, dtype=dtype), kind).dtype == torch.float32
