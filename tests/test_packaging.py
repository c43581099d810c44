"""The distribution: entry points, light import, and a Makefile that a newcomer can type."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import specmoe_compile

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> str:
    """Run code in a fresh process outside of the repository and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_backend_is_found_without_importing_the_package() -> None:
    assert run_python("import torch; print('specmoe' in torch._dynamo.list_backends(None))") == (
        "True"
    )


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, specmoe_compile;"
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from specmoe_compile.cli.main import run; run(['bench', '--help']);"
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    assert run_python(code).splitlines()[-1] == "[]"


def test_console_script_and_backend_are_declared() -> None:
    points = importlib.metadata.distribution("specmoe-compile").entry_points
    found = {(point.group, point.name): point.value for point in points}
    assert found["console_scripts", "specmoe"] == "specmoe_compile.cli.main:main"
    assert found["torch_dynamo_backends", "specmoe"] == "specmoe_compile.backend:specmoe"


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == specmoe_compile.__version__


def test_every_public_name_can_be_imported() -> None:
    for name in specmoe_compile.__all__:
        assert getattr(specmoe_compile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = specmoe_compile.nonsense


def test_package_is_typed() -> None:
    assert (ROOT / "specmoe_compile" / "py.typed").is_file()


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "specmoe demo"),
        ("test", 'pytest -m "not slow and not gpu"'),
        ("check", "mypy"),
        ("bench", "benchmarks cpu_disk"),
        ("publish", "benchmarks end_to_end"),
    ],
)
def test_make_targets_set_up_an_environment_first(
    target: str, command: str, tmp_path: Path
) -> None:
    """What a fresh clone would run: the environment, then the command."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    arguments = ["make", "--dry-run", target]
    done = subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True, text=True)
    setup = done.stdout.index("-m venv .venv")
    install = done.stdout.index("pip install")
    engine = done.stdout.index("-m specmoe_compile.runtime.cpu.native")
    assert setup < install < engine < done.stdout.index(command)


def test_an_environment_that_is_there_is_not_set_up_again(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    arguments = ["make", "--dry-run", "test"]
    done = subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "pip install" not in done.stdout


def test_continuous_integration_runs_make_check() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check" in script.read_text()


def test_every_file_of_the_package_goes_into_a_wheel() -> None:
    package = ROOT / "specmoe_compile"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["specmoe_compile"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    built = {"__pycache__", ".so"}
    found = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".py"}
    missing = {path for path in found - packed if not built & {path.parent.name, path.suffix}}
    assert not missing
    assert package / "reference_model" / "checkpoint" / "model.safetensors" in packed


def test_the_package_imports_nothing_of_the_repository() -> None:
    for path in (ROOT / "specmoe_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            tops = {name.partition(".")[0] for name in names}
            assert not tops & {"benchmarks", "tests"}, path
