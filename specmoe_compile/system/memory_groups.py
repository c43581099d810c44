"""Memory control groups of Linux, versions 1 and 2: which hold this process, and what they leave.

A limit may be set on the process's own group or on any group above it (batch systems, systemd,
nested containers), and each counts what all groups below it use. Pages of files that were read are
charged to the group that read them, but the kernel takes them back when the group needs memory:
they are free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")
_NO_LIMIT = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of a page."""
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One control group: the version of its interface, and its folder."""

    version: int
    folder: Path

    def room_bytes_or_none(self) -> int | None:
        """Bytes that can still be used before the kernel refuses, or kills; None without a limit.

        Memory that holds clean or dirty pages of files, or kernel objects that can be dropped,
        counts as free.
        """
        if self.version == 1:
            limits = [self._number_or_none("memory.limit_in_bytes")]
            used = self._number_or_none("memory.usage_in_bytes")
        else:
            # Above memory.high nobody is killed, but the group is slowed down until it is below.
            limits = [self._number_or_none(name) for name in ("memory.max", "memory.high")]
            used = self._number_or_none("memory.current")
        limit = min((n for n in limits if n is not None and n < _NO_LIMIT), default=None)
        if limit is None or used is None:
            return None
        return min(limit, max(limit - used, 0) + self._reclaimable_bytes(at_most=used))

    def counts_groups_below(self) -> bool:
        """Whether what groups below use counts here; one in version 1 may be set not to."""
        return self.version == 2 or self._number_or_none("memory.use_hierarchy") != 0

    def _reclaimable_bytes(self, *, at_most: int) -> int:
        try:
            lines = (self.folder / "memory.stat").read_text(encoding="ascii").splitlines()
        except OSError:
            return 0
        stat = {key: int(value) for key, value in (line.split() for line in lines)}
        # Version 1 has this group's own pages, and with "total_" those of groups below as well.
        prefix = "total_" if self.version == 1 else ""
        names = ("inactive_file", "active_file", "slab_reclaimable")
        return min(at_most, sum(stat.get(prefix + name, 0) for name in names))

    def _number_or_none(self, name: str) -> int | None:
        """Return the number in a file; None if there is no such file or it says "max"."""
        try:
            text = (self.folder / name).read_text(encoding="ascii").strip()
        except OSError:
            return None
        return int(text) if text.isdigit() else None


def own_memory_groups(proc: Path = _PROC) -> list[MemoryGroup]:
    """Return this process's group and the visible ones above it, innermost first.

    Empty where there are none: another system, or one without the memory controller.

    Args:
        proc: the folder of the process, with `cgroup` and `mountinfo`.
    """
    try:
        paths = _paths_by_version((proc / "cgroup").read_text(encoding="utf-8"))
        mounts = _mounts((proc / "mountinfo").read_text(encoding="utf-8"))
    except OSError:
        return []
    for version in (1, 2):  # where both are mounted, one of them has the memory controller
        path = paths.get(version)
        seen = [mount for mount in mounts if mount.version == version]
        if path is None or not seen:
            continue
        mount = next((m for m in seen if path.is_relative_to(m.root)), seen[-1])
        if version == 1 or "memory" in _controllers(mount.folder):
            return _groups_between(mount, path)
    return []


def room_bytes_or_none() -> int | None:
    """Bytes that this process can still use within all its groups; None if none has a limit."""
    rooms: list[int] = []
    for index, group in enumerate(own_memory_groups()):
        if index and not group.counts_groups_below():
            break
        room = group.room_bytes_or_none()
        if room is not None:
            rooms.append(room)
    return min(rooms, default=None)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy with the memory controller: `root` is which group its top folder is."""

    version: int
    root: PurePosixPath
    folder: Path


def _paths_by_version(text: str) -> dict[int, PurePosixPath]:
    """The process's place in each hierarchy that may have the memory controller."""
    paths: dict[int, PurePosixPath] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            paths[1] = PurePosixPath(path)
    return paths


def _mounts(text: str) -> list[_Mount]:
    """Hierarchies that are mounted and not hidden by a later mount on the same folder."""
    found: dict[str, _Mount | None] = {}
    for line in text.splitlines():
        place, _, kind = line.partition(" - ")
        fields, (file_system, *rest) = place.split(), kind.split()
        root, folder = _unescape(fields[3]), _unescape(fields[4])
        version = None
        if file_system == "cgroup2":
            version = 2
        elif file_system == "cgroup" and "memory" in rest[-1].split(","):
            version = 1
        found.pop(folder, None)  # later mounts of a folder hide earlier ones, and come last
        found[folder] = _Mount(version, PurePosixPath(root), Path(folder)) if version else None
    return [mount for mount in found.values() if mount is not None]


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def _groups_between(mount: _Mount, path: PurePosixPath) -> list[MemoryGroup]:
    """Groups from the process's own up to the top of a mount, innermost first.

    A container may see only its own group, mounted as if it were the top, while the process's path
    still counts from the real top or, with a namespace, from the namespace's: what cannot be found
    below the mount is the mount itself.
    """
    try:
        inner = path.relative_to(mount.root)
    except ValueError:
        inner = PurePosixPath()
    folder = mount.folder / inner
    if ".." in inner.parts or not folder.is_dir():
        inner, folder = PurePosixPath(), mount.folder
    above = [mount.folder / parent for parent in inner.parents]
    return [MemoryGroup(mount.version, place) for place in (folder, *above)]


def _controllers(folder: Path) -> list[str]:
    """Controllers of a group of version 2."""
    try:
        return (folder / "cgroup.controllers").read_text(encoding="ascii").split()
    except OSError:
        return []
