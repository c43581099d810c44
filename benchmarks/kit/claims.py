"""What a result is judged by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Something that must hold: what was asked, what was measured, and whether it does."""

    text: str
    measured: str
    holds: bool
