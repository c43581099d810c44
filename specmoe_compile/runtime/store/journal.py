"""The journal of a pack: the layers that it has finished, for the pack that goes on after a kill.

Its first line names what is packed, each other one a layer, with the checksums of its records.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from specmoe_compile.runtime.store.base import RecordSource, layer_offsets, total_bytes_of
from specmoe_compile.runtime.store.header import RECORDS_NAME

PARTIAL_NAME = f"{RECORDS_NAME}.partial"
JOURNAL_NAME = "packing.journal"


def open_journal(folder: Path) -> int:
    """Open a folder's journal to add lines; the caller closes the descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    return os.open(folder / JOURNAL_NAME, flags, 0o644)


def begin_journal(journal: int, source: RecordSource) -> None:
    """Start anew: no layer of `source` is finished."""
    os.ftruncate(journal, 0)
    _append(journal, {"fingerprint": source.fingerprint})


def note_layer(journal: int, source: RecordSource, layer: int, checksums: list[int]) -> None:
    """Say that a layer's records are durable."""
    digest = _layer_digest_or_none(source, layer)
    _append(journal, {"layer": layer, "checksums": checksums, "source": digest})


def finished_layers(source: RecordSource, folder: Path) -> list[list[int]]:
    """Return the checksums of the layers that a killed pack of these weights has finished.

    A line that was cut by the kill ends the journal; so does a records file that is too short, and
    a layer whose weights were changed since.
    """
    try:
        lines = (folder / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()
        size_bytes = (folder / PARTIAL_NAME).stat().st_size
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    ends = (*layer_offsets(source.layers)[1:], total_bytes_of(source.layers))
    checksums: list[list[int]] = []
    for index, line in enumerate(lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        if index == 0:
            if entry.get("fingerprint") != source.fingerprint:
                return []
            continue
        layer = index - 1
        if entry.get("layer") != layer or layer >= len(ends) or ends[layer] > size_bytes:
            break
        if entry.get("source") != _layer_digest_or_none(source, layer):
            break
        sums = entry.get("checksums")
        if not isinstance(sums, list) or len(sums) != source.layers[layer].num_experts:
            break
        checksums.append(sums)
    return checksums


def _layer_digest_or_none(source: RecordSource, layer: int) -> str | None:
    return None if source.content is None else source.content.layer_digest(layer)


def _append(journal: int, entry: dict[str, Any]) -> None:
    """Append one line and make it durable."""
    os.write(journal, (json.dumps(entry) + "\n").encode())
    os.fsync(journal)
