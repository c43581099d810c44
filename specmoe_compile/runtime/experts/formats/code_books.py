"""What one code is worth: a row of functions per code book.

4-bit codes lie two to a byte, the low nibble being the even column. Every code book has at most
256 codes, and decoding is exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Values of the eight magnitudes of e2m1 (one sign, two exponent and one mantissa bit).
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, appendix E.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INT4_ZERO = 8
"""The code that means 0 where an int4 weight has no plane of zeros."""


class CodeBook(NamedTuple):
    """One way to turn a number into a code and back.

    Attributes:
        bits: of one code; 4-bit codes are packed in pairs. 0 for plain floats.
        dtype: of the code plane; None where the plane has the weights' own float dtype.
        largest: the largest magnitude that a code can have.
        decode: code plane [..., K/2 or K] -> values [..., K], float32.
        nearest: values, float32 -> the values of the nearest codes; out of range saturates.
        encode: values [..., K], float32 -> plane of the nearest codes.
    """

    bits: int
    dtype: torch.dtype | None
    largest: float
    decode: Callable[[Tensor], Tensor]
    nearest: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]

    def columns(self, inputs: int) -> int:
        """Columns of the code plane for K inputs; raises `ValueError` for half a byte."""
        if self.bits != 4:
            return inputs
        if inputs % 2:
            raise ValueError(f"4-bit codes come in pairs, got a weight of {inputs} inputs")
        return inputs // 2


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., K] of 0..15, any integer dtype -> [..., K/2] uint8, low nibble = even column."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[..., K/2] uint8 -> [..., K] uint8 of 0..15, low nibble = even column."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _itself(values: Tensor) -> Tensor:
    return values


def _decode_plain(codes: Tensor) -> Tensor:
    return codes.float()


def _decode_e2m1(codes: Tensor) -> Tensor:
    table = _table((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), codes.device)
    return table[unpack_nibbles(codes).int()]


def _nearest_e2m1(values: Tensor) -> Tensor:
    """Ties go to the even code, as in casting to a float format: steps of 1/2, 1 and 2."""
    magnitude = values.abs().clamp(max=E2M1_VALUES[-1])
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return torch.copysign((magnitude / step).round() * step, values)


def _encode_e2m1(values: Tensor) -> Tensor:
    nearest = _nearest_e2m1(values)
    code = torch.searchsorted(_table(E2M1_VALUES, values.device), nearest.abs())
    return pack_nibbles(code | (torch.signbit(nearest).int() << 3))


def _decode_int4(codes: Tensor) -> Tensor:
    return unpack_nibbles(codes).float() - INT4_ZERO


def _nearest_int4(values: Tensor) -> Tensor:
    return values.round().clamp(-INT4_ZERO, 15 - INT4_ZERO)


def _encode_int4(values: Tensor) -> Tensor:
    return pack_nibbles(_nearest_int4(values) + INT4_ZERO)


def _decode_nf4(codes: Tensor) -> Tensor:
    return _table(NF4_VALUES, codes.device)[unpack_nibbles(codes).int()]


def _nf4_codes(values: Tensor) -> Tensor:
    table = _table(NF4_VALUES, values.device)
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


def _nearest_nf4(values: Tensor) -> Tensor:
    return _table(NF4_VALUES, values.device)[_nf4_codes(values)]


def _encode_nf4(values: Tensor) -> Tensor:
    return pack_nibbles(_nf4_codes(values))


def _decode_e4m3(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def _as_e4m3(values: Tensor) -> Tensor:
    # The cast makes NaN of what is too large.
    return values.clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)


def _nearest_e4m3(values: Tensor) -> Tensor:
    return _as_e4m3(values).float()


def _encode_e4m3(values: Tensor) -> Tensor:
    return _as_e4m3(values).view(torch.uint8)


def _decode_int8(codes: Tensor) -> Tensor:
    return codes.float()


def _nearest_int8(values: Tensor) -> Tensor:
    return values.round().clamp(-127, 127)


def _encode_int8(values: Tensor) -> Tensor:
    return _nearest_int8(values).to(torch.int8)


_E4M3_LARGEST = 448.0

CODE_BOOKS: Mapping[str, CodeBook] = {
    "plain": CodeBook(0, None, float("inf"), _decode_plain, _itself, _itself),
    "e2m1": CodeBook(4, torch.uint8, E2M1_VALUES[-1], _decode_e2m1, _nearest_e2m1, _encode_e2m1),
    "int4": CodeBook(4, torch.uint8, 7.0, _decode_int4, _nearest_int4, _encode_int4),
    "nf4": CodeBook(4, torch.uint8, 1.0, _decode_nf4, _nearest_nf4, _encode_nf4),
    "e4m3": CodeBook(8, torch.uint8, _E4M3_LARGEST, _decode_e4m3, _nearest_e4m3, _encode_e4m3),
    "int8": CodeBook(8, torch.int8, 127.0, _decode_int8, _nearest_int8, _encode_int8),
}
"""A new number format is one more row here."""
