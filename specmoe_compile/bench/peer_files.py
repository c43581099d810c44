"""Files that other engines read, made once from a checkpoint and kept beside the expert store.

- `mmap`: the state of the Hugging Face model as it is after loading, one safetensors file, so that
  its parameters can be mapped without a copy;
- `llama_cpp`: GGUF.

    python -m specmoe_compile.bench.peer_files JOB RESULT

makes the file of a job in a process of its own: it may need the memory of the whole model.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from specmoe_compile.bench.plain_model import load_plain
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.system.output import (
    quiet_transformers,
    sentence,
    user_error_or_none,
    write_json,
)

MODULE = "specmoe_compile.bench.peer_files"


def peer_file(job: ArmJob) -> Path:
    """Return the file of a job's arm, made if it is not there yet.

    Raises:
        ValueError: the model is no folder, or not one that the arm's format can hold.
        CheckpointError: the folder is not a checkpoint.
        SpecMoEError: a package is missing.
    """
    from specmoe_compile.hf.checkpoint import Checkpoint
    from specmoe_compile.system.machine import cache_folder

    folder = Path(job.model)
    if not folder.is_dir():
        raise ValueError(
            f"The arm {job.arm} reads a checkpoint folder, and {job.model!r} is none: download the"
            " model first and give its folder."
        )
    with Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint:
        content = checkpoint.content([list(checkpoint.tensors)], recipe="whole checkpoint")
        identity = content.combined()[:12]
    suffix, write = WRITERS[job.arm]
    place = cache_folder() if job.store_dir is None else Path(job.store_dir).parent
    path = place / f"{folder.name}-{job.dtype}-{identity}{suffix}"
    if not path.is_file():
        place.mkdir(parents=True, exist_ok=True)
        _write(path, folder, job.dtype, write)
    return path


def _write(path: Path, folder: Path, dtype: str, write: Callable[[Path, str, Path], None]) -> None:
    """Write under another name first, so that the file is complete or not there."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        write(folder, dtype, Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_mapped(folder: Path, dtype: str, path: Path) -> None:
    """Write a model's parameters and buffers as Hugging Face holds them after loading."""
    from safetensors.torch import save_file

    state: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in load_plain(str(folder), dtype).state_dict().items():
        # Tied weights are one tensor under several names; loading ties them again.
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor.contiguous()
    save_file(state, path)


def write_gguf(folder: Path, dtype: str, path: Path) -> None:
    """Write GGUF, as llama.cpp reads it."""
    from specmoe_compile.bench.gguf_checkpoint import convert

    convert(folder, dtype, path)


WRITERS: Mapping[str, tuple[str, Callable[[Path, str, Path], None]]] = {
    "mmap": (".mapped.safetensors", write_mapped),
    "llama_cpp": (".gguf", write_gguf),
}
"""Ending and writer of each arm's file."""


def main(job_path: str, result_path: str) -> int:
    """Make one job's file; returns the exit status."""
    job = ArmJob(**json.loads(Path(job_path).read_text(encoding="utf-8")))
    quiet_transformers()
    try:
        path = peer_file(job)
    except Exception as error:
        known = user_error_or_none(error)
        if known is None:
            raise
        print(sentence(known), file=sys.stderr)
        return 2
    write_json(Path(result_path), str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
