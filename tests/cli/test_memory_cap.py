"""Memory caps by control groups, version 1 and 2; a real one where that is permitted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specmoe_compile.bench import memory_cap as module
from specmoe_compile.bench.child import ArmFailedError, run_python
from specmoe_compile.bench.memory_cap import (
    MemoryCap,
    memory_cap,
    own_memory_group_or_none,
    why_not_permitted,
)

MIB = 1 << 20
needs_groups = pytest.mark.skipif(
    why_not_permitted() is not None, reason="control groups are not permitted here"
)


@needs_groups
def test_child_runs_inside_its_group_and_the_group_is_removed() -> None:
    with memory_cap(256 * MIB) as cap:
        command = cap.wrap([sys.executable, "-c", "print(open('/proc/self/cgroup').read())"])
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert cap.folder.name in shown
        assert cap.limit_bytes == 256 * MIB
        peak = cap.peak_bytes_or_none()
        assert peak is not None
        assert 0 < peak <= 256 * MIB
        assert not cap.was_killed()
        folder = cap.folder
    assert not folder.exists()


@needs_groups
def test_child_that_needs_more_is_ended_and_the_message_names_the_cap() -> None:
    with (
        memory_cap(64 * MIB) as cap,
        pytest.raises(ArmFailedError, match=r"memory cap of 64\.0 MiB"),
    ):
        run_python(["-c", f"bytearray({512 * MIB})"], cap=cap)
    assert not cap.folder.exists()


def fake_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, version: int, own: str) -> Path:
    """Point the module at a folder that looks like a control group file system."""
    root = tmp_path / "cgroup"
    root.mkdir()
    lines = f"4:memory:/{own}\n0::/\n" if version == 1 else f"0::/{own}\n"
    (tmp_path / "self").write_text(lines)
    (root / own).mkdir(parents=True)
    if version == 2:
        (root / "cgroup.controllers").write_text("memory\n")
    monkeypatch.setattr(module, "_V1_ROOT", root if version == 1 else tmp_path / "none")
    monkeypatch.setattr(module, "_V2_ROOT", root)
    original = Path.read_text

    def read_text(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path == Path("/proc/self/cgroup"):
            path = tmp_path / "self"
        return original(path, encoding=encoding, errors=errors)

    monkeypatch.setattr(Path, "read_text", read_text)
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_own_group_is_found_for_both_versions(
    version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = fake_groups(monkeypatch, tmp_path, version=version, own="user/me")
    assert own_memory_group_or_none() == (version, root / "user/me")


def test_version_2_tries_the_parent_when_its_own_group_may_not_hand_out_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = fake_groups(monkeypatch, tmp_path, version=2, own="user/me")
    tried: list[Path] = []

    def create(version: int, parent: Path, limit_bytes: int) -> MemoryCap:
        tried.append(parent)
        if parent.name == "me":
            raise OSError(16, "Device or resource busy")
        folder = parent / "group"
        folder.mkdir()
        return MemoryCap(version=version, folder=folder, limit_bytes=limit_bytes)

    monkeypatch.setattr(module, "_create", create)
    with memory_cap(5 * MIB) as cap:
        assert cap.folder == root / "user/group"
    assert tried == [root / "user/me", root / "user"]
    assert not cap.folder.exists()


def test_where_no_group_can_be_made_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_groups(monkeypatch, tmp_path, version=2, own="user/me")

    def create(version: int, parent: Path, limit_bytes: int) -> MemoryCap:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "_create", create)
    reason = why_not_permitted()
    assert reason is not None
    assert "Permission denied" in reason


def test_kills_are_read_from_both_versions(tmp_path: Path) -> None:
    first = MemoryCap(version=1, folder=tmp_path, limit_bytes=1)
    second = MemoryCap(version=2, folder=tmp_path, limit_bytes=1)
    assert not first.was_killed()
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
    assert first.was_killed()
    assert not second.was_killed()
