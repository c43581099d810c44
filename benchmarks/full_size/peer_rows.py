"""Rows of a rival system, a JSON object a line, that a second call goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class RowFile:
    """The rows of a file: one for each system, model, format, arm and context."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[tuple[Any, ...], Row] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._rows[self._key(row)] = row

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("system", "model", "format", "arm", "context"))

    def has(self, row: Row) -> bool:
        """Whether this cell was measured."""
        return "tpot_ms" in self._rows.get(self._key(row), {})

    def get(self, row: Row) -> Row:
        """The kept row of this cell, else the row itself."""
        return self._rows.get(self._key(row), row)

    def keep(self, row: Row) -> None:
        """Put a row in the place of the one of its cell, and write the file."""
        self._rows[self._key(row)] = row
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text("".join(f"{json.dumps(r)}\n" for r in self._rows.values()), "utf-8")
        part.replace(self._path)
        print(json.dumps(row), flush=True)
