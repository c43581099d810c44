"""What `from_pretrained` and `offload` are asked for, checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.experts.formats.quantise import checked_quantize
from specmoe_compile.runtime.store.writer import refuse_file
from specmoe_compile.system.sizes import parse_size

StoreKind = Literal["auto", "ram", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """What both entry points take, checked."""

    device: torch.device
    quantize: str | None
    store: StoreKind
    expert_cache: int | str | None
    store_dir: Path | None
    cache_policy: Policy
    reader_threads: int
    verify: bool
    progress: bool


def checked_options(
    device: str | torch.device,
    quantize: str | None,
    store: str,
    expert_cache: int | str | None,
    store_dir: str | os.PathLike[str] | None,
    cache_policy: str,
    reader_threads: int,
    verify: bool,
    progress: bool,
) -> OffloadOptions:
    """Check the options that need no model.

    Raises:
        ValueError, TypeError: one is not valid.
        StoreError: `store_dir` is a file.
    """
    for name, value, kinds in (
        ("store", store, get_args(StoreKind)),
        ("cache_policy", cache_policy, get_args(Policy)),
    ):
        check_choice(name, value, kinds)
    if isinstance(reader_threads, bool) or not isinstance(reader_threads, int):
        raise TypeError(f"reader_threads={reader_threads!r} must be an int.")
    if reader_threads < 1:
        raise ValueError(f"reader_threads={reader_threads} must be at least 1.")
    if expert_cache is not None:
        parse_size(expert_cache, total_bytes=1 << 40)
    folder = None if store_dir is None else Path(store_dir).expanduser()
    if folder is not None:
        refuse_file(folder)
    return OffloadOptions(
        device=_checked_device(device),
        quantize=checked_quantize(quantize),
        store=store,  # type: ignore[arg-type]
        expert_cache=expert_cache,
        store_dir=folder,
        cache_policy=cache_policy,  # type: ignore[arg-type]
        reader_threads=reader_threads,
        verify=verify,
        progress=progress,
    )


def check_choice(name: str, value: object, kinds: Sequence[str]) -> None:
    if value not in kinds:
        raise ValueError(f"{name}={value!r} is not valid: choose {', '.join(map(repr, kinds))}.")


def _checked_device(device: str | torch.device) -> torch.device:
    """Resolve "auto" and check that the device is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not a device: give 'auto', 'cpu' or 'cuda'."
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is not supported: give 'auto', 'cpu' or 'cuda'.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} is not possible: PyTorch sees no CUDA device here. Use "
            "device='cpu'."
        )
    return resolved
