"""Triton functions that turn code words into numbers by bit arithmetic.

A word is 32 bits of a row of codes: eight of 4 bits or four of 8 bits, the lowest bits first. Two
codes are decoded at a time, in the halves of the word, into two float16 whose bits the code gives
directly; converted to float32 they are the code's value times a power of two (`code_factor`), which
the caller applies to sums.

| book | float16 bits of a code | value of those bits |
|---|---|---|
| e2m1 | sign to bit 15, magnitude to bits 9 to 11 | value * 2**-14 |
| e4m3 | sign to bit 15, magnitude to bits 7 to 13 | value * 2**-8 |
| int4 | 0x6400 or code | 1024 + code |
| int8 | 0x6400 or (code xor 0x80) | 1152 + code |

Every step is exact. Only nf4, which no arithmetic yields, is looked up: its table of 16 float32 is
an argument.

Shape letters: R rows, W words of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pair(word, BOOK: tl.constexpr):
    """Bits of two float16: of the codes in the lowest bits of each half of `word`, uint32."""
    if BOOK == "e2m1":
        return ((word & 0x00070007) << 9) | ((word & 0x00080008) << 12)
    elif BOOK == "int4":
        return (word & 0x000F000F) | 0x64006400
    elif BOOK == "int8":
        return ((word & 0x00FF00FF) ^ 0x00800080) | 0x64006400
    else:
        tl.static_assert(BOOK == "e4m3", "unknown code book")
        magnitude = word & 0x007F007F
        # 0x7f is NaN: all exponent bits of the float16 are set there, and nowhere else.
        nan = (magnitude + 0x00010001) & 0x00800080
        return ((magnitude | nan) << 7) | ((word & 0x00800080) << 8)


@triton.jit
def _halves(pair):
    """The two float16 of a word as float32, the low one first, [...] -> [..., 2]."""
    low = pair.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high).to(tl.float32)


@triton.jit
def _looked_up(word, table):
    """Values of the codes in the lowest 4 bits of each half of `word`, [...] -> [..., 2]."""
    low = (word & 15).to(tl.int32)
    high = ((word >> 16) & 15).to(tl.int32)
    return tl.join(tl.load(table + low), tl.load(table + high))


@triton.jit
def decode_words(words, table, R: tl.constexpr, W: tl.constexpr, BOOK: tl.constexpr):
    """Numbers of a tile of words in the order of the row, before `code_factor` and zeros.

    Args:
        words: [R, W] int32.
        table: [16] float32, read for nf4 only.

    Returns:
        [R, 8 W] or [R, 4 W] float32.
    """
    word = words.to(tl.uint32, bitcast=True)
    # A row's codes are numbered half * 4 + s (4 bit) or half * 2 + s: `join` puts the last bit of
    # that number last.
    if BOOK == "e4m3" or BOOK == "int8":
        both = tl.join(_halves(_pair(word, BOOK)), _halves(_pair(word >> 8, BOOK)))
        values = tl.reshape(both, [R, W * 4])
    else:
        if BOOK == "nf4":
            n0 = _looked_up(word, table)
            n1 = _looked_up(word >> 4, table)
            n2 = _looked_up(word >> 8, table)
            n3 = _looked_up(word >> 12, table)
        else:
            n0 = _halves(_pair(word, BOOK))
            n1 = _halves(_pair(word >> 4, BOOK))
            n2 = _halves(_pair(word >> 8, BOOK))
            n3 = _halves(_pair(word >> 12, BOOK))
        values = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [R, W * 8])
    return values


@triton.jit
def code_factor(BOOK: tl.constexpr):
    """What `decode_words` leaves to be multiplied by."""
    if BOOK == "e2m1":
        return 16384.0
    elif BOOK == "e4m3":
        return 256.0
    else:
        return 1.0


@triton.jit
def code_zero(BOOK: tl.constexpr):
    """What `decode_words` leaves to be subtracted where groups have no zeros of their own."""
    if BOOK == "int4":
        return 1032.0
    elif BOOK == "int8":
        return 1152.0
    else:
        return 0.0


@triton.jit
def decode_scale(scale, SCALE: tl.constexpr):
    """Scales as float32, exactly; kinds "e8m0" and "e4m3" are bytes.

    The byte 255 is NaN in both: what was never written shows.
    """
    if SCALE == "e8m0":
        bits = scale.to(tl.uint32)
        # 0 is 2**-127, a number without the leading bit.
        bits = tl.where(bits == 0, 0x00400000, bits << 23)
        value = bits.to(tl.float32, bitcast=True)
        return tl.where(scale == 255, float("nan"), value)
    elif SCALE == "e4m3":
        bits = scale.to(tl.uint16)
        magnitude = bits & 0x7F
        half = (magnitude << 7) | ((bits & 0x80) << 8)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where(magnitude == 0x7F, float("nan"), value)
    else:
        return scale.to(tl.float32)
