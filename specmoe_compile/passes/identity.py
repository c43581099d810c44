"""What the rewritten graph depends on besides the options: sources of the package.

Inductor's FX graph cache answers instead of the passes when their identity is the one that it
knows. So the identity covers every module of the package that the passes import, directly or by way
of others: constants of kernels, registries, schemas of ops and what else steers a rewrite.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def modules_behind(starts: Iterable[str], root: Path = _ROOT) -> Mapping[str, Path]:
    """Modules of a package, by name, that some of them need, those included.

    Args:
        starts: names below the package, such as `passes.manager`.
        root: the package's folder.
    """
    found: dict[str, Path] = {}
    waiting = set(starts)
    while waiting:
        name = waiting.pop()
        path = root.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name not in found and path.is_file():
            found[name] = path
            waiting |= _imports(path.read_text(encoding="utf-8"), root.name)
    return dict(sorted(found.items()))


def _imports(source: str, package: str) -> set[str]:
    """Names below the package that imports may mean, wherever they stand."""
    names: set[str] = set()
    for line in ast.walk(ast.parse(source)):
        if isinstance(line, ast.Import):
            names.update(alias.name for alias in line.names)
        elif isinstance(line, ast.ImportFrom) and line.module:
            names.update(f"{line.module}.{alias.name}" for alias in line.names)
            names.add(line.module)
    return {name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")}


@functools.cache
def source_hash(root: Path = _ROOT) -> str:
    """Hash of all passes and of what they need."""
    passes = (f"passes.{path.stem}" for path in (root / "passes").glob("*.py"))
    digest = hashlib.sha256()
    for name, path in modules_behind(passes, root).items():
        source = path.read_bytes()
        digest.update(f"{name} {len(source)} ".encode() + source)
    return digest.hexdigest()
