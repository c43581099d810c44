"""Reading safetensors checkpoints: what is there, one tensor or some rows at a time.

Files are read with `pread`, not mapped: pages of a mapping count as memory of the process, and
loading would then peak at the size of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any, Self

import torch

from specmoe_compile.errors import CheckpointError
from specmoe_compile.runtime.store.known_files import FileIdentity
from specmoe_compile.runtime.store.source_content import SelectedFile, SourceContent
from specmoe_compile.system.files import pread_into

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F4": torch.uint8,  # two to a byte
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library itself takes
_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """One tensor of a safetensors file: type, shape, and bytes start..stop of the file."""

    file: _SafetensorsFile
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype; raises `CheckpointError` for one that cannot be read."""
        dtype = _DTYPES.get(self.dtype_name)
        if dtype is None:
            raise CheckpointError(
                f"{self.file.path} holds a tensor of dtype {self.dtype_name}, which cannot be read."
            )
        return dtype

    def read(self) -> torch.Tensor:
        """Read the whole tensor into new memory; of 4-bit floats, [..., K/2] uint8."""
        return self._read(self.shape, self.start, self.stop)

    def read_rows(self, first: int, count: int) -> torch.Tensor:
        """Read rows first..first+count of the first dimension, [count, ...]."""
        row_bytes = (self.stop - self.start) // self.shape[0]
        start = self.start + first * row_bytes
        return self._read((count, *self.shape[1:]), start, start + count * row_bytes)

    def _read(self, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        dtype = self.dtype
        if self.dtype_name == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        if stop == start:
            return torch.empty(shape, dtype=dtype)
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        self.file.read_into(buffer, start)
        if self.file.observer is not None:
            self.file.observer(self.file.fd, self.start, self.stop, start, buffer)
        return buffer.view(dtype).view(shape)

    # What the loader of transformers asks of a lazy tensor (a safetensors slice).
    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype_name


class _SafetensorsFile:
    """An open safetensors file; its header is checked against its size.

    `observer` is told what is read: descriptor, start and stop of the tensor, place, bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.observer: Callable[[int, int, int, int, torch.Tensor], None] | None = None
        self.opened_ns = time.time_ns()
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CheckpointError(f"The checkpoint's file {path} is missing.") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            self.identity = FileIdentity.of(os.fstat(self.fd))
            self.size_bytes = self.identity.size_bytes
            self.header, self.tensors = self._parse()
        except BaseException:
            os.close(self.fd)
            raise

    def _parse(self) -> tuple[bytes, dict[str, CheckpointTensor]]:
        """Read the header; returns it and the tensors it names."""
        length = int.from_bytes(os.pread(self.fd, 8, 0), "little")
        if self.size_bytes < 8 or not 0 < length <= min(self.size_bytes - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path} is truncated or is not a safetensors file: it has {self.size_bytes} "
                "bytes and its header does not fit in them. Download it again."
            )
        header = os.pread(self.fd, length, 8)
        tensors: dict[str, CheckpointTensor] = {}
        end = 8 + length
        try:
            for name, item in json.loads(header).items():
                if name == "__metadata__":
                    continue
                start, stop = item["data_offsets"]
                _check_entry(name, item, start, stop)
                tensors[name] = CheckpointTensor(
                    file=self,
                    dtype_name=item["dtype"],
                    shape=tuple(item["shape"]),
                    start=8 + length + start,
                    stop=8 + length + stop,
                )
                end = max(end, 8 + length + stop)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f" ({error})" if isinstance(error, _EntryError) else ""
            raise CheckpointError(
                f"{self.path} has a damaged safetensors header{why}. Download it again."
            ) from error
        if end != self.size_bytes:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: it has {self.size_bytes} bytes, its header "
                f"promises {end}. Download it again."
            )
        return header, tensors

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        """Fill `buffer` ([n] uint8) from byte `start`."""
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            try:
                count = pread_into(self.fd, view[done:], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"Reading {self.path} at byte {start + done} failed: {error.strerror or error}."
                ) from error
            if count == 0:
                raise CheckpointError(f"{self.path} ended while it was read: it was truncated.")
            done += count

    def update_digest(self, digest: Any) -> None:
        """Add name, size, header and evenly spaced samples of the content to a hash."""
        digest.update(f"{self.path.name}:{self.size_bytes}:".encode())
        digest.update(self.header)
        data = 8 + len(self.header)
        span = max(self.size_bytes - data - _SAMPLE_BYTES, 0)
        for index in range(_SAMPLES):
            digest.update(os.pread(self.fd, _SAMPLE_BYTES, data + span * index // (_SAMPLES - 1)))

    def select(self, ranges: Mapping[str, tuple[int, int]], recipe: str) -> SelectedFile:
        """Return the file with the tensors of it that are packed, by name."""
        return SelectedFile(
            path=self.path,
            fd=self.fd,
            identity=self.identity,
            opened_ns=self.opened_ns,
            ranges=ranges,
            recipe=recipe,
        )

    def close(self) -> None:
        os.close(self.fd)


class _EntryError(ValueError):
    """What is wrong with an entry of a header, as a clause."""


def _check_entry(name: str, item: dict[str, Any], start: Any, stop: Any) -> None:
    """Raise `_EntryError` unless a tensor's place is inside the data and fits dtype and shape."""
    shape, dtype = item["shape"], _DTYPES.get(item["dtype"])
    numbers = [*shape, start, stop]
    if any(type(number) is not int or number < 0 for number in numbers) or stop < start:
        raise _EntryError(f"{name[:100]} has no shape or no place")
    if dtype is not None and prod(shape) * dtype.itemsize != stop - start:
        raise _EntryError(f"{name[:100]} has a shape of other bytes than its place")


class Checkpoint:
    """The safetensors files of a checkpoint, opened together; a context manager.

    Attributes:
        tensors: every tensor by its name in the checkpoint.
        source_files: `{path: (bytes, mtime_ns)}` of the files.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self._files: list[_SafetensorsFile] = []
        self.tensors: dict[str, CheckpointTensor] = {}
        try:
            for file in files:
                opened = _SafetensorsFile(Path(file))
                self._files.append(opened)
                self.tensors.update(opened.tensors)
        except BaseException:
            self.close()
            raise
        self.source_files = {
            str(file.path.resolve()): (file.size_bytes, file.identity.mtime_ns)
            for file in self._files
        }

    def identity(self) -> str:
        """Return a hex digest of names, sizes, headers and samples of the content of all files.

        A name that is found at once. Whether every byte is the same, `content` tells.
        """
        digest = hashlib.sha256()
        for file in sorted(self._files, key=lambda file: file.path.name):
            file.update_digest(digest)
        return digest.hexdigest()

    def content(self, layers: Sequence[Sequence[str]], *, recipe: str) -> SourceContent:
        """Return the hashes of some tensors' bytes, which are computed as the tensors are read.

        Args:
            layers: names of the tensors of each MoE layer.
            recipe: digest of how they are made into experts.
        """
        files: list[SelectedFile] = []
        names = {name for layer in layers for name in layer}
        for file in self._files:
            ranges = {
                name: (tensor.start, tensor.stop)
                for name, tensor in file.tensors.items()
                if name in names and self.tensors[name].file is file
            }
            if ranges:
                files.append(file.select(ranges, recipe))
        content = SourceContent(files, layers)
        for file in self._files:
            file.observer = content.saw
        return content

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_checkpoint_folder(folder: Path, variant: str | None = None) -> None:
    """Check a local checkpoint folder before anything is loaded from it.

    `variant` is part of the files' names (`model.fp16.safetensors`), None without one.

    Raises:
        CheckpointError: it has no configuration, no safetensors weights, or a missing or truncated
            shard.
    """
    config_path = folder / "config.json"
    if not config_path.is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter: load its base model, with adapter={str(folder)!r}."
        )
    if not config_path.is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json.")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        names_its_weights = bool(config.get("transformers_weights"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config_path} is damaged: it is not a JSON object.") from error
    if not names_its_weights:
        Checkpoint(_checkpoint_files(folder, variant)).close()


def _is_inside(name: str) -> bool:
    """Whether a shard's name, as an index gives it, stays in the checkpoint's folder."""
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _checkpoint_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files of a local folder, as its index names them."""
    infix = "" if variant is None else f".{variant}"
    single_path = folder / f"model{infix}.safetensors"
    index_path = folder / f"model.safetensors.index{infix}.json"
    if single_path.is_file():
        return [single_path]
    if not index_path.is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".gguf"))
        hint = f" ({others[0]} is not safetensors; convert it first)" if others else ""
        raise CheckpointError(
            f"{folder} has no weights: neither {single_path.name} nor {index_path.name} is "
            f"there{hint}."
        )
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if not _is_inside(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is damaged. Download it again.") from error
    if outside:
        raise CheckpointError(
            f"{index_path} names a file outside of its folder, {outside[0][:100]!r}: that is no"
            " shard of this checkpoint. Do not trust it; download it again from its author."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards that its index names, for "
            f"example {missing[0]}. Download it again."
        )
    return [folder / name for name in names]
