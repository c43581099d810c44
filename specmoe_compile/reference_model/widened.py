"""The reference model with experts as large as those of a model that does not fit."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.reference_model import CHECKPOINT_DIR

_DISK_COPIES = 3  # the widened checkpoint, the expert store, accelerate's offload folder


def widened_model(place: Path, record_mib: float, dtype: str = "float32") -> Path:
    """Return the folder of the reference model with larger experts, made on the first call.

    Args:
        place: folder for it.
        record_mib: size of one expert.
        dtype: "float32" or "bfloat16".

    Raises:
        ValueError: this size is not possible.
        SpecMoEError: there is no room.
    """
    from specmoe_compile.reference_model.widen import DTYPES, MIB, copies_for, widen

    with (CHECKPOINT_DIR / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    model = place / f"reference-{record_mib:g}mib-{dtype}-{digest}"
    if (model / "config.json").is_file():
        return model
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text(encoding="utf-8"))
    record_bytes = round(record_mib * MIB)
    copies_for(record_bytes, config["hidden_size"], config["moe_intermediate_size"], DTYPES[dtype])
    place.mkdir(parents=True, exist_ok=True)
    needed = _DISK_COPIES * 256 * record_bytes
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SpecMoEError(
            f"{place} has {free >> 20} MiB free, and this needs about {needed >> 20} MiB: choose"
            " another --folder"
        )
    # In a process of its own: the caller's peak memory is that of the model it runs.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(
            widen, CHECKPOINT_DIR, model, record_bytes, DTYPES[dtype], progress=True
        ).result()
    return model
