"""`header.json` of an expert store on disk: what it says, how it is written, read and checked."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT, ExpertFormat
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer, TensorSpec
from specmoe_compile.runtime.store.known_files import FileIdentity
from specmoe_compile.runtime.store.source_content import SourceFile

FORMAT = "specmoe-expert-store"
VERSION = 2
_READ_VERSIONS = (1, 2)  # version 1 has no formats: its records are plain
CHECKSUM = "rowcol64-crc32"
HEADER_NAME = "header.json"
RECORDS_NAME = "experts.bin"
_ROW_WORDS = 512  # 64-bit words: one 4096-byte page


def record_checksum(record: np.ndarray) -> int:
    """Return the 32-bit checksum of a record ([n x 4096] uint8, contiguous).

    The record is read as 64-bit words in rows of one page; the wrapping sums of rows and of columns
    go into a CRC-32. A flipped bit, a page that is zeroed, lost or swapped, and a wrong record all
    change it. It runs at memory speed on any machine (a CRC of the bytes themselves does not
    everywhere), so that every record can be checked when it is read.
    """
    words = record.view(np.uint64).reshape(-1, _ROW_WORDS)
    rows = np.add.reduce(words, axis=1)
    columns = np.add.reduce(words, axis=0)
    return zlib.crc32(columns, zlib.crc32(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreHeader:
    """What a store on disk holds.

    Attributes:
        layers: the MoE layers, in order.
        top_k: K, the most experts that one token uses in a layer.
        fingerprint: hex digest that names the weights and the record format.
        source_name: what was packed, for people.
        source_files: files of the checkpoint, `{path: [bytes, mtime_ns]}`; empty for a model that
            was packed from memory.
        checksums: one per record, [layer][expert].
        packed_from: hashes of what was packed, by file; empty for a model that was packed from
            memory, and in stores that were written before there were such hashes.
    """

    layers: tuple[StoreLayer, ...]
    top_k: int
    fingerprint: str
    source_name: str
    source_files: dict[str, tuple[int, int]]
    checksums: tuple[tuple[int, ...], ...]
    packed_from: tuple[SourceFile, ...] = ()


def layers_to_json(layers: Sequence[StoreLayer]) -> list[dict[str, Any]]:
    """Return layers as plain data; a fingerprint is made of it.

    Plain records say nothing about their format, so that their fingerprint is that of version 1.
    """
    return [
        {
            "name": layer.name,
            "num_experts": layer.num_experts,
            "record_bytes": layer.layout.record_bytes,
            "tensors": [
                {
                    "name": spec.name,
                    "shape": list(spec.shape),
                    "dtype": str(spec.dtype).removeprefix("torch."),
                    "offset_bytes": spec.offset_bytes,
                }
                for spec in layer.layout.tensors
            ],
            **({} if layer.layout.format.is_plain else {"format": layer.layout.format.to_json()}),
        }
        for layer in layers
    ]


def _layer_from_json(data: dict[str, Any]) -> StoreLayer:
    tensors = tuple(
        TensorSpec(
            name=item["name"],
            shape=tuple(_count(size) for size in item["shape"]),
            dtype=_dtype(item["dtype"]),
            offset_bytes=item["offset_bytes"],
        )
        for item in data["tensors"]
    )
    format = ExpertFormat.from_json(data["format"]) if "format" in data else PLAIN_FORMAT
    layout = ExpertLayout(tensors=tensors, record_bytes=data["record_bytes"], format=format)
    # The reader trusts these numbers with raw memory, so they must be what this version lays out.
    if layout != ExpertLayout.from_shapes({t.name: (t.shape, t.dtype) for t in tensors}, format):
        raise ValueError(f"the record of {data['name']} is laid out in another way")
    if not isinstance(data["name"], str) or not tensors:
        raise ValueError("a layer has no name or no tensors")
    return StoreLayer(name=data["name"], num_experts=_count(data["num_experts"]), layout=layout)


def _count(value: Any) -> int:
    """Return a number of things, at least one; raises `ValueError` for anything else."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a number of experts or a size")
    return value


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def header_text(header: StoreHeader) -> str:
    """Return the content of `header.json`."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "complete": True,
        "fingerprint": header.fingerprint,
        "source_name": header.source_name,
        "source_files": {path: list(value) for path, value in header.source_files.items()},
        "packed_from": [asdict(file) for file in header.packed_from],
        "top_k": header.top_k,
        "layers": layers_to_json(header.layers),
        "checksum": CHECKSUM,
        "checksums": [list(values) for values in header.checksums],
    }
    return json.dumps({**body, "header_crc32": _body_crc32(body)}, indent=1)


def _body_crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read_header(folder: Path) -> StoreHeader:
    """Read and check the header of a store.

    Raises:
        StoreError: there is no complete store in the folder, or its header is damaged or of another
            version.
    """
    path = folder / HEADER_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        what = "no such folder" if not folder.exists() else f"it has no {HEADER_NAME}"
        raise StoreError(
            f"{folder} is not a complete expert store: {what}. Pack the model into it first."
        ) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not text") from error
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise _damaged(path, "it is not JSON") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise StoreError(f"{path} is not the header of an expert store.")
    if body.get("version") not in _READ_VERSIONS:
        raise StoreError(
            f"The expert store {folder} has format version {body.get('version')}, this specmoe "
            f"reads versions up to {VERSION}. Delete the folder and pack again."
        )
    checksum = body.pop("header_crc32", None)
    if checksum != _body_crc32(body):
        raise _damaged(path, "it does not match its own checksum")
    return _parse(path, body)


def _parse(path: Path, body: dict[str, Any]) -> StoreHeader:
    """Turn a checked body into a header; raises `StoreError` if it does not hold together."""
    try:
        if body["complete"] is not True or body["checksum"] != CHECKSUM:
            raise ValueError("it is marked incomplete or uses another checksum")
        header = StoreHeader(
            layers=tuple(_layer_from_json(item) for item in body["layers"]),
            top_k=int(body["top_k"]),
            fingerprint=str(body["fingerprint"]),
            source_name=str(body["source_name"]),
            source_files={k: (v[0], v[1]) for k, v in body["source_files"].items()},
            checksums=tuple(tuple(values) for values in body["checksums"]),
            packed_from=tuple(_source_file(item) for item in body.get("packed_from", ())),
        )
        if [len(values) for values in header.checksums] != [n.num_experts for n in header.layers]:
            raise ValueError("it does not have one checksum per record")
        if not header.layers or header.top_k < 1:
            raise ValueError("it has no layers, or no expert per token")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise _damaged(path, str(error)) from error
    return header


def _source_file(item: dict[str, Any]) -> SourceFile:
    identity = item["identity"]
    known = None if identity is None else FileIdentity(**identity)
    return SourceFile(path=item["path"], part=item["part"], digest=item["digest"], identity=known)


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged ({why}). Delete the folder and pack again.")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
