"""What a result must say about where it came from: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from specmoe_compile.system.machine import cpu_count

PACKAGES = ("torch", "transformers", "triton", "accelerate", "safetensors", "nvtx", "numpy")


def provenance() -> dict[str, Any]:
    """Where a result comes from: `commit`, `machine` and `versions`."""
    return {"commit": commit_or_none(), "machine": describe_machine(), "versions": versions()}


def commit_or_none() -> str | None:
    """Return the commit of the source tree, "-dirty" added if it has changes; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def describe_machine() -> dict[str, Any]:
    """Processor, memory, system and GPU, without anything that names the machine itself."""
    import torch

    gpu: dict[str, Any] | None = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _nvidia_driver_or_none(),
        }
    return {
        "cpu": _cpu_name(),
        "cores": cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": gpu,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it stands on; None for what is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("specmoe-compile", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows what there is to know
    return platform.processor() or platform.machine()


def _nvidia_driver_or_none() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    first = text.splitlines()[0] if text else ""
    return first.partition(":")[2].strip() or None
