"""Whether a file is the very one that was hashed before, and the hashes that are remembered.

Hashing a checkpoint runs at the disk's speed at best, so what was hashed is remembered by the
file's identity: device, inode, size, and the two times that the system keeps. The time of change
(ctime) is set by the kernel at every write; `touch`, `cp -p` and `rsync -t` cannot set it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from specmoe_compile.system.machine import cache_folder

logger = logging.getLogger(__name__)

# A write in the same tick of the file system's clock leaves the times as they were. Ticks are a few
# milliseconds on Linux, a second or two on old file systems.
_SETTLED_NS = 3_000_000_000
# File systems that have no time of change of their own: it follows the time of modification there,
# which anybody may set.
_WITHOUT_CHANGE_TIME = ("fuse", "vfat", "msdos", "exfat")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What tells one state of one file from every other: size in bytes, times in ns."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )


def settled_identity_or_none(fd: int, identity: FileIdentity, since_ns: int) -> FileIdentity | None:
    """Return `identity` if whoever sees it again sees the bytes that were read from `fd`.

    None if the file was changed since it was opened, or too shortly before for its times to show a
    further change, or lies on a file system whose times prove nothing.

    Args:
        fd: the open file.
        identity: its identity when it was opened.
        since_ns: wall-clock time when it was opened, before anything was read.
    """
    if FileIdentity.of(os.fstat(fd)) != identity:
        return None
    if since_ns - identity.ctime_ns < _SETTLED_NS:  # or from the future: the clock was set back
        return None
    kind = _file_system_or_none(identity.device)
    if kind is not None and kind.startswith(_WITHOUT_CHANGE_TIME):
        return None
    return identity


def _file_system_or_none(device: int) -> str | None:
    """Return the type of the file system with a device number, None where nobody says."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        mount, _, tail = line.partition(" - ")
        if wanted in mount.split()[2:3] and tail:
            return tail.split()[0]
    return None


def recall(path: Path, part: str, identity: FileIdentity) -> str | None:
    """Return what `remember` was told about a part of a file, if the file has not changed."""
    try:
        entry = json.loads(_note_path(path, part).read_text(encoding="utf-8"))
        if entry["identity"] == asdict(identity):
            return str(entry["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or not one of ours: it is made again
    return None


def remember(path: Path, part: str, identity: FileIdentity, digest: str) -> None:
    """Note the hash of a part of a file in the user's cache folder; a note that fails is none.

    Args:
        path: the file.
        part: which part of it, a word that `recall` is given again.
        identity: from `settled_identity_or_none`.
        digest: what to remember.
    """
    note = _note_path(path, part)
    entry = {"path": str(path.resolve()), "identity": asdict(identity), "digest": digest}
    temporary = None
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=note.parent, prefix=note.name)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        os.replace(temporary, note)
    except OSError as error:
        logger.debug("The hash of %s is not remembered: %s", path, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _note_path(path: Path, part: str) -> Path:
    name = hashlib.sha256(f"{path.resolve()}\0{part}".encode()).hexdigest()[:32]
    return cache_folder() / "hashes" / f"{name}.json"
