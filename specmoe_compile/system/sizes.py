"""Sizes that users write ("2GiB", "500MB", "25%", 1073741824) and sizes that we print."""

from __future__ import annotations

import re

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+|%)?\s*")
_LARGEST = 1e18
_EXPECTED = 'bytes as an int, a size such as "2GiB" or "500MB", or a share such as "25%"'


def parse_size(value: int | str, *, total_bytes: int, option: str = "expert_cache") -> int:
    """Return the bytes that a size means.

    Args:
        value: bytes as an int or as digits; a number with a unit (B, KB, MB, GB, TB: powers of
            1000; KiB, MiB, GiB, TiB: powers of 1024), in any case; or a percentage of
            `total_bytes`.
        total_bytes: what 100 % is.
        option: name of the option, for the message.

    Raises:
        TypeError: `value` is neither an int nor a string.
        ValueError: it cannot be read, is negative, or is more than 100 %.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{option}={value!r} is a {type(value).__name__}; give {_EXPECTED}.")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{option}={value} must not be negative; give {_EXPECTED}.")
        return value
    match = _PATTERN.fullmatch(value)
    if match is None:
        raise ValueError(f"{option}={value!r} is not a size; give {_EXPECTED}.")
    number, unit = float(match[1]), (match[2] or "B").upper()
    if number > _LARGEST:
        raise ValueError(f"{option}={_shortened(value)} is more than any machine has.")
    if unit == "%":
        if number > 100:
            raise ValueError(f"{option}={value!r} must be at most 100%.")
        return _whole(total_bytes * number / 100)
    if unit not in _UNITS:
        raise ValueError(f"{option}={value!r} has an unknown unit {match[2]!r}; give {_EXPECTED}.")
    return _whole(number * _UNITS[unit])


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:20]}...{text[-10:]}")


def _whole(size: float) -> int:
    """Round down, but not to zero: a tiny size is a size that is too small, and not none."""
    return max(int(size), 1) if size > 0 else 0


def format_bytes(size_bytes: int) -> str:
    """Return a size for people, in powers of 1024: "805.3 MiB"."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"
