"""What commands print: one sentence for a mistake, JSON files, tables.

Results go to standard output, everything about them (progress, notices) to standard error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.system.out_of_memory import is_out_of_memory

USER_ERRORS = (ValueError, TypeError, SpecMoEError, OSError, MemoryError, OverflowError)
"""Errors that a user can do something about: one sentence and exit status 2."""


def user_error_or_none(error: BaseException) -> BaseException | None:
    """Return the error that one sentence explains, looking through torch.compile's wrapping."""
    if isinstance(error, USER_ERRORS):
        return error
    if isinstance(error, ImportError):
        # A package that is missing; one of our own modules would be our mistake.
        ours = (error.name or "").startswith("specmoe_compile")
        return None if ours else error
    if is_out_of_memory(error):
        return error
    inner = getattr(error, "inner_exception", None)
    return user_error_or_none(inner) if isinstance(inner, BaseException) else None


def sentence(error: BaseException) -> str:
    """Return an error as one line that ends like a sentence."""
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}"
    elif isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        text = f"The Python package {package!r} is missing: install it, for example with pip"
    elif isinstance(error, OverflowError):
        text = f"A number is too large: {error}"
    elif is_out_of_memory(error):
        text = _out_of_memory(error)
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _out_of_memory(error: BaseException) -> str:
    """PyTorch's own figures, without its hints on the allocator, and what to lower."""
    text = " ".join(str(error).split())
    figures = _FIGURES.search(text)
    what = figures[0].rstrip(".") if figures else text or "the system has none left"
    return (
        f"Memory is short: {what[:1].lower()}{what[1:]}; lower --expert-cache, the number of new"
        " tokens or the length of the prompt"
    )


_FIGURES = re.compile(
    r"[Yy]ou tried to allocate \d+ bytes|Tried to allocate [^.]*\.\d+ \w+\."
    r"( GPU \d+ has a total capacity of \S+ \w+ of which \S+ \w+ is free)?"
)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, never a part of it.

    A link is followed. What is no ordinary file (a device, a pipe, the terminal), and a file that
    has other names too, is written to and never replaced.
    """
    path = path.expanduser()
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    stream = _own_stream_or_none(path)
    if stream is not None:
        stream.write(text)
        stream.flush()
        return
    target = Path(os.path.realpath(path))
    if _is_ordinary(path):
        _replace(target, text)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _own_stream_or_none(path: Path) -> TextIO | None:
    """Standard output or error where `path` is the same file: /dev/stdout, /dev/fd/2.

    Opened again it would start at the beginning and overwrite what was printed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream
    return None


def _is_ordinary(path: Path) -> bool:
    """Whether a file with one name is there, or nothing is."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _replace(path: Path, text: str) -> None:
    """Put a new file in the place of the old one, with its permissions."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        mode = 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def check_writable(path: Path | None, option: str = "json") -> None:
    """Raise before any work is done if a result file could not be written at the end."""
    if path is None:
        return
    given, path = path, path.expanduser()
    if path.is_dir():
        raise ValueError(f"--{option} {given} is a folder: name a file.")
    if not _is_ordinary(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"--{option} {given} is not writable.")
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The folder of --{option} {given} does not exist: create it first."
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"The folder of --{option} {given} is not writable.")


def quiet_transformers() -> None:
    """Keep transformers' own notices and progress bars out of the way of ours."""
    from transformers.utils import logging as transformers_logging

    quiet: Any = transformers_logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    # It has a handler of its own; without this each of its retries is told twice.
    logging.getLogger("huggingface_hub").propagate = False
