"""Packing a checkpoint: from its folder or hub name to an expert store on disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import torch

from specmoe_compile.runtime.experts.formats.quantise import checked_quantize
from specmoe_compile.runtime.store.base import RecordSource
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.matching import belongs_to_others
from specmoe_compile.runtime.store.writer import StoreReport, pack_records
from specmoe_compile.system.machine import cache_folder

__all__ = ["StoreReport", "default_store_dir", "pack", "pack_source"]


def pack(
    path_or_id: str | os.PathLike[str],
    store_dir: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    quantize: str | None = None,
    progress: bool = True,
    verify: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    **hf_kwargs: Any,
) -> StoreReport:
    """Write a checkpoint's experts into a store on disk, which `from_pretrained` then uses.

    Args:
        path_or_id: a local folder, or a model's name on the Hugging Face hub; safetensors.
        store_dir: the folder to write; by default the one that `from_pretrained` looks for.
        dtype: a torch dtype or its name; "auto" is the checkpoint's.
        quantize: as for `from_pretrained`.
        progress: say on standard error how far it is.
        verify: read the store back afterwards and compare all checksums.
        adapter: folder or hub name of a LoRA adapter (PEFT) to merge into the experts.
        hf_kwargs: as for `from_pretrained`.

    Raises:
        CheckpointError, UnsupportedModelError, ValueError: as `from_pretrained`.
        StoreError: the folder cannot be written or holds another store, or the disk is full.
    """
    # transformers takes a second to import; who opens a store does not need it.
    from specmoe_compile.hf.model_loader import Skeleton, checked_dtype, read_experts

    reports: list[StoreReport] = []

    def place_experts(skeleton: Skeleton) -> None:
        folder = None if store_dir is None else Path(store_dir).expanduser()
        reports.append(pack_source(skeleton.source, folder, progress=progress))

    read_experts(
        path_or_id,
        dtype=checked_dtype(dtype),
        hf_options=hf_kwargs,
        place_experts=place_experts,
        quantize=checked_quantize(quantize),
        adapter=adapter,
    )
    if verify:
        with contextlib.closing(DiskStore.open(reports[0].path)) as store:
            store.verify(progress=progress)
    return reports[0]


def pack_source(source: RecordSource, folder: Path | None, *, progress: bool = True) -> StoreReport:
    """Make sure that there is a store of a source on disk.

    Args:
        source: a checkpoint, or a model in memory.
        folder: the caller's, which is never overwritten. None for one under the user's cache
            folder: there a store of the same files is packed anew if they were changed, and one
            of other files keeps its place.
        progress: show a progress bar.

    Raises:
        StoreError: as `pack_records`.
    """
    if folder is not None:
        return pack_records(source, folder, progress=progress)
    first = default_store_dir(source)
    folders = (
        first if n == 1 else first.with_name(f"{first.name}-{n}") for n in itertools.count(1)
    )
    ours = next(f for f in folders if not belongs_to_others(source, f, progress=progress))
    return pack_records(source, ours, progress=progress, replace=True)


def default_store_dir(source: RecordSource) -> Path:
    """Return where a model's store lies unless the caller says: named after model and weights."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", source.name.strip("/").rpartition("/")[2]) or "model"
    layout = source.layers[0].layout
    dtype = layout.format.slug or layout.numbers
    return cache_folder() / f"{name}-{dtype}-{source.fingerprint[:12]}"
