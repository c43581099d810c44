"""Which bytes of a checkpoint a store was packed from, by their SHA-256.

The bytes are hashed while they are packed, in a thread of their own. A later load compares: a file
that is known to be unchanged (`known_files`) costs nothing, any other is read and hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specmoe_compile.errors import CheckpointError
from specmoe_compile.runtime.store.known_files import (
    FileIdentity,
    recall,
    remember,
    settled_identity_or_none,
)
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.files import pread_into
from specmoe_compile.system.progress import progress_bar

_CHUNK_BYTES = 8 << 20
_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file that a store was packed from.

    Attributes:
        path: where it was, for people.
        part: names the tensors that were packed from it, and how they are made into experts.
        digest: SHA-256 of these tensors' bytes.
        identity: the file's, None if it proves nothing.
    """

    path: str
    part: str
    digest: str
    identity: FileIdentity | None


@dataclass(slots=True, kw_only=True)
class SelectedFile:
    """An open file of a checkpoint, and the tensors in it that are packed.

    Attributes:
        path, fd: the file.
        identity, opened_ns: its identity when it was opened, and when that was.
        ranges: bytes start..stop of each tensor, by its name.
        recipe: digest of how the tensors are made into experts.
    """

    path: Path
    fd: int
    identity: FileIdentity
    opened_ns: int
    ranges: Mapping[str, tuple[int, int]]
    recipe: str
    part: str = field(init=False)

    def __post_init__(self) -> None:
        tensors = sorted((start, stop, name) for name, (start, stop) in self.ranges.items())
        text = json.dumps([self.recipe, tensors])
        self.part = hashlib.sha256(text.encode()).hexdigest()

    def settled_identity_or_none(self) -> FileIdentity | None:
        return settled_identity_or_none(self.fd, self.identity, self.opened_ns)


class SourceContent:
    """The bytes of a checkpoint that are packed: hashed at most once, remembered by file."""

    def __init__(self, files: Sequence[SelectedFile], layers: Sequence[Sequence[str]]) -> None:
        """Describe what is packed.

        Args:
            files: those that hold any of it.
            layers: names of the tensors that each MoE layer is made from.
        """
        self._files = files
        self._layers = layers
        self._by_tensor = {name: file for file in files for name in file.ranges}
        self._by_start = {
            (file.fd, start): name
            for file in files
            for name, (start, stop) in file.ranges.items()
            if start < stop
        }
        self._digests: dict[str, str] = {}
        self._file_digests: dict[str, str] = {}
        self._passing: _PassingHashes | None = None
        self._stopped = threading.Event()

    @contextlib.contextmanager
    def hashing_reads(self) -> Iterator[None]:
        """Hash in this block what `saw` is told."""
        with _PassingHashes() as passing:
            self._passing = passing
            try:
                yield
                self._digests.update(passing.finished())
            finally:
                self._passing = None

    def saw(self, fd: int, start: int, stop: int, offset: int, data: torch.Tensor) -> None:
        """Take note of bytes that were read from a tensor.

        Args:
            fd: of the file.
            start, stop: the tensor's bytes in it.
            offset: where `data` begins in the file.
            data: [n] uint8, CPU, contiguous.
        """
        if self._passing is None:
            return
        name = self._by_start.get((fd, start))
        if name is not None and name not in self._digests:
            self._passing.update(name, start, stop, offset, data)

    def layer_digest(self, layer: int) -> str:
        """Return the hash of the bytes that a MoE layer is made from; reads what was not seen."""
        if self._passing is not None:
            self._digests.update(self._passing.finished())
        digest = hashlib.sha256()
        for name in self._layers[layer]:
            digest.update(f"{name}:{self._digest(name)}:".encode())
        return digest.hexdigest()

    def files(self, *, progress: bool = False) -> tuple[SourceFile, ...]:
        """Return all files with their hashes; reads what was neither seen nor is remembered."""
        self._hash(self._files, progress=progress)
        return tuple(
            SourceFile(
                path=str(file.path.resolve()),
                part=file.part,
                digest=self._file_digests[file.part],
                identity=file.settled_identity_or_none(),
            )
            for file in self._files
        )

    def equals(self, packed: Sequence[SourceFile], *, progress: bool = False) -> bool:
        """Return whether a store's files are these, byte by byte of what is packed.

        Files whose identity is the one that was packed are known to be; others are hashed.
        """
        by_part = {file.part: file for file in packed}
        if by_part.keys() != {file.part for file in self._files}:
            return False
        unknown = [file for file in self._files if by_part[file.part].identity != file.identity]
        self._hash(unknown, progress=progress)
        return all(self._file_digests[file.part] == by_part[file.part].digest for file in unknown)

    def combined(self, *, progress: bool = False) -> str:
        """Return one hash of everything that is packed."""
        self._hash(self._files, progress=progress)
        parts = sorted(self._file_digests[file.part] + file.part for file in self._files)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def _hash(self, files: Sequence[SelectedFile], *, progress: bool) -> None:
        """Make sure that files have a digest: seen while packing, remembered, or hashed now."""
        unknown: list[SelectedFile] = []
        for file in files:
            if file.part in self._file_digests or file.ranges.keys() <= self._digests.keys():
                continue
            known = recall(file.path, file.part, file.identity)
            if known is None:
                unknown.append(file)
            else:
                self._file_digests[file.part] = known
        total_bytes = sum(stop - start for file in unknown for start, stop in file.ranges.values())
        with (
            progress_bar(total_bytes, "Hashing checkpoint", enabled=progress) as bar,
            ThreadPoolExecutor(min(_THREADS, len(unknown), os.cpu_count() or 1) or 1) as pool,
        ):
            try:
                for _ in pool.map(lambda file: self._hash_tensors(file, bar), unknown):
                    pass
            except BaseException:
                self._stopped.set()  # the threads would read on to the end of their files
                raise
        for file in files:
            if file.part in self._file_digests:
                continue
            digest = hashlib.sha256()
            for name in sorted(file.ranges, key=lambda name: file.ranges[name]):
                digest.update(f"{name}:{self._digests[name]}:".encode())
            self._file_digests[file.part] = digest.hexdigest()
            if file in unknown:
                identity = file.settled_identity_or_none()
                if identity is not None:
                    remember(file.path, file.part, identity, self._file_digests[file.part])

    def _hash_tensors(self, file: SelectedFile, bar: Any) -> None:
        for name in sorted(file.ranges, key=lambda name: file.ranges[name]):
            self._digest(name)
            start, stop = file.ranges[name]
            bar.update(stop - start)

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            file = self._by_tensor[name]
            self._digests[name] = self._hash_range(file, *file.ranges[name])
        return self._digests[name]

    def _hash_range(self, file: SelectedFile, start: int, stop: int) -> str:
        """Return the SHA-256 of bytes start..stop of a file; raises `CheckpointError`."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, stop - start)))
        while start < stop:
            if self._stopped.is_set():
                raise CheckpointError(f"Reading {file.path} was interrupted.")
            try:
                count = pread_into(file.fd, buffer[: stop - start], start)
            except OSError as error:
                raise CheckpointError(f"{file.path} cannot be read: {error.strerror}.") from error
            if count == 0:
                raise CheckpointError(f"{file.path} ended while it was read: it was truncated.")
            digest.update(buffer[:count])
            start += count
        return digest.hexdigest()


class _PassingHashes:
    """Hashes of tensors whose bytes come by in order, computed in one thread beside the caller.

    The bytes are copied into two chunks of fixed memory. Were they only kept until their turn came,
    a thread that gets no core would let the caller's heap grow to several times of what waits.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, tuple[Any, int, int]] = {}  # hash, next offset, stop
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(2):
            self._free.put(aligned_empty(_CHUNK_BYTES))
        self._waiting: queue.SimpleQueue[tuple[Any, torch.Tensor, int] | None]
        self._waiting = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="specmoe-hash", daemon=True)

    def update(self, name: str, start: int, stop: int, offset: int, data: torch.Tensor) -> None:
        """Hash `data` if it comes next in its tensor; bytes seen before and gaps are left out."""
        sha, expected, _ = self._hashes.get(name, (None, start, stop))
        if offset != expected:
            return
        sha = hashlib.sha256() if sha is None else sha
        self._hashes[name] = (sha, offset + data.numel(), stop)
        for part in data.split(_CHUNK_BYTES):
            chunk = self._free.get()
            chunk[: part.numel()].copy_(part)
            self._waiting.put((sha, chunk, part.numel()))

    def finished(self) -> list[tuple[str, str]]:
        """Return name and digest of the tensors that came by as a whole."""
        chunks = [self._free.get() for _ in range(2)]  # both are free: everything is hashed
        for chunk in chunks:
            self._free.put(chunk)
        whole = [name for name, (_, offset, stop) in self._hashes.items() if offset == stop]
        return [(name, self._hashes[name][0].hexdigest()) for name in whole]

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            sha, chunk, size_bytes = item
            sha.update(chunk[:size_bytes].numpy().data)
            self._free.put(chunk)

    def __enter__(self) -> _PassingHashes:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._waiting.put(None)
        self._thread.join()
