"""A progress bar in bytes."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]


def progress_bar(total_bytes: int, what: str, *, enabled: bool) -> Any:
    """Return a tqdm bar on stderr; it appears only if the work takes longer than two seconds."""
    return tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=2.0,
        disable=not enabled,
        leave=False,
    )
