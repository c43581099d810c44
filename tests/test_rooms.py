"""The house has rooms with a direction: who may import whom, checked in the sources.

A room is a package, or a module that stands alone. Imports under `TYPE_CHECKING` and inside
functions count like any other: a name that a file knows is a name that it depends on.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "specmoe_compile"
MAX_RUNTIME_FILES = 12

ALL_BEFORE = {"*"}
# From the ground up, and what each may import; `errors` is open to all.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "system": set(),
    "predict": set(),
    "options": {"predict"},
    "runtime.experts": set(),
    "runtime.cache": {"system", "runtime.experts"},
    "runtime.store": {"system", "runtime.experts"},
    "runtime.transfer": {"system", "runtime.experts", "runtime.cache", "runtime.store"},
    "kernels": {"runtime.experts", "runtime.cache"},
    "runtime.policy": ALL_BEFORE,
    "runtime.engine": ALL_BEFORE,
    "runtime.session": ALL_BEFORE,
    "runtime.cpu": ALL_BEFORE,
    "runtime.cuda": ALL_BEFORE,
    "ops": {"runtime.session"},
    "passes": {"predict", "options", "kernels", "ops"},
    "hf": ALL_BEFORE,
    "api": ALL_BEFORE,
    "__init__": ALL_BEFORE,
    "calibrate": ALL_BEFORE,
    "backend": ALL_BEFORE,
    "reference_model": set(),
    "replay": ALL_BEFORE,
    "bench": ALL_BEFORE,
    "serve": ALL_BEFORE,
    "cli": ALL_BEFORE,
}
NEVER = {
    ("runtime.cuda", "runtime.cpu"),
    ("hf", "passes"),
    ("hf", "runtime.cpu"),
    ("hf", "runtime.cuda"),
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file names in an import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for full in names:
            top, _, inner = full.partition(".")
            parent = inner.rpartition(".")[0]
            if top == PACKAGE.name:
                known = (name for name in (inner, parent) if name in MODULES)
                found.add(next(known, "__init__"))
    return found


MODULES = _modules()


@functools.cache
def imports_of(module: str) -> set[str]:
    """Modules that a module imports; read when a test asks, and not while tests are collected."""
    return _imports(MODULES[module])


def room_of(module: str) -> str:
    """The room that a module stands in."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "runtime" and rest else first


def may_import(room: str, other: str) -> bool:
    """Whether the table has an arrow from one room to another."""
    if other in (room, "errors") or other in ROOMS[room]:
        return True
    order = list(ROOMS)
    before = order.index(other) < order.index(room)
    return before and ROOMS[room] == ALL_BEFORE and (room, other) not in NEVER


def reached_from(module: str) -> set[str]:
    """Modules that a module imports, directly or by way of others."""
    reached: set[str] = set()
    open_ones = [module]
    while open_ones:
        for other in imports_of(open_ones.pop()) - reached:
            reached.add(other)
            open_ones.append(other)
    return reached


def test_every_file_stands_in_a_room() -> None:
    assert {room_of(name) for name in MODULES} - {"runtime"} <= set(ROOMS)


def test_no_room_imports_one_above_it() -> None:
    arrows = {
        (name, other)
        for name in MODULES
        if name != "runtime"  # holds rooms
        for other in imports_of(name)
        if not may_import(room_of(name), room_of(other))
    }
    assert not arrows


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert not {name for name in MODULES if name in reached_from(name)}


def test_runtime_holds_rooms_and_not_files() -> None:
    assert len(list((PACKAGE / "runtime").glob("*.py"))) <= MAX_RUNTIME_FILES
