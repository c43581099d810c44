"""A memory cap for a child process: a control group of its own, version 1 or 2.

The page cache that the child fills counts too, and so does what it maps from files. A command is
inside its group from its first instruction on, by way of a shell that joins the group and then
becomes the command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specmoe_compile.system.memory_groups import own_memory_groups

logger = logging.getLogger(__name__)

_REMOVE_TRIES = 50
_JOIN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCap:
    """A control group with a limit, ready for commands.

    Attributes:
        version: 1 or 2.
        folder: of the control group.
        limit_bytes: limit, as the kernel rounded it.
    """

    version: int
    folder: Path
    limit_bytes: int

    def wrap(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` inside the group."""
        return ["/bin/sh", "-c", _JOIN, str(self.folder / "cgroup.procs"), *command]

    def peak_bytes_or_none(self) -> int | None:
        """Most memory charged to the group so far, page cache included; None if not recorded."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        try:
            return int((self.folder / name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def was_killed(self) -> bool:
        """Whether the kernel killed a process of the group for want of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        try:
            lines = (self.folder / name).read_text(encoding="ascii").splitlines()
        except OSError:
            return False
        return any(line.split()[0:1] == ["oom_kill"] and line.split()[1] != "0" for line in lines)


def why_not_permitted() -> str | None:
    """Return why memory caps are not possible here, as a clause; None if they are."""
    try:
        with memory_cap(256 << 20):
            return None
    except PermissionError as error:
        return str(error)


@contextlib.contextmanager
def memory_cap(limit_bytes: int) -> Iterator[MemoryCap]:
    """Create a control group with a memory limit (swap included), and remove it afterwards.

    Raises:
        PermissionError: this system or this user cannot; the message says why.
    """
    groups = own_memory_groups()
    if not groups:
        raise PermissionError("this system has no memory control groups")
    version = groups[0].version
    # Version 2 lets only groups without processes of their own hand out limits, so our own group
    # seldom can, and its parent may.
    reasons: list[str] = []
    for parent in groups[:version]:
        try:
            group = _create(version, parent.folder, limit_bytes)
        except OSError as error:
            reasons.append(error.strerror or str(error))
            continue
        try:
            yield group
        finally:
            _remove(group.folder)
        return
    raise PermissionError(
        f"control groups (version {version}) cannot be created here: {'; '.join(reasons)}"
    )


def _create(version: int, parent: Path, limit_bytes: int) -> MemoryCap:
    if version == 2:
        controllers = (parent / "cgroup.subtree_control").read_text(encoding="ascii").split()
        if "memory" not in controllers:
            (parent / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
    folder = parent / f"specmoe-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        if version == 1:
            limit = folder / "memory.limit_in_bytes"
            limit.write_text(str(limit_bytes), encoding="ascii")
            # Present only where the kernel accounts swap.
            with contextlib.suppress(OSError):
                (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes), "ascii")
        else:
            limit = folder / "memory.max"
            limit.write_text(str(limit_bytes), encoding="ascii")
            with contextlib.suppress(OSError):
                (folder / "memory.swap.max").write_text("0", encoding="ascii")
        held = int(limit.read_text(encoding="ascii"))
        if not os.access(folder / "cgroup.procs", os.W_OK):
            raise PermissionError("the group exists, but processes may not join it")
    except BaseException:
        _remove(folder)
        raise
    return MemoryCap(version=version, folder=folder, limit_bytes=held)


def _remove(folder: Path) -> None:
    """Remove an empty group; processes that are just ending hold it for a moment."""
    for _ in range(_REMOVE_TRIES):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)
    logger.warning("the control group %s is still in use and was left behind", folder)
