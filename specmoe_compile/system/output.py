"""What commands print: one sentence for a mistake, JSON files, tables.

Results go to standard output, everything about them (progress, notices) to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from specmoe_compile.errors import SpecMoEError

USER_ERRORS = (ValueError, TypeError, SpecMoEError, OSError)
"""Errors that a user can do something about: one sentence and exit status 2."""


def user_error_or_none(error: BaseException) -> BaseException | None:
    """Return the error that one sentence explains, looking through torch.compile's wrapping."""
    if isinstance(error, USER_ERRORS):
        return error
    inner = getattr(error, "inner_exception", None)
    return user_error_or_none(inner) if isinstance(inner, BaseException) else None


def sentence(error: BaseException) -> str:
    """Return an error as one line that ends like a sentence."""
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, never a part of it."""
    path = path.expanduser()
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(path: Path | None, option: str = "json") -> None:
    """Raise before any work is done if a result file could not be written at the end."""
    if path is None:
        return
    folder = path.expanduser().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of --{option} {path} does not exist: create it first.")
    if path.is_dir():
        raise ValueError(f"--{option} {path} is a folder: name a file.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"The folder of --{option} {path} is not writable.")


def quiet_transformers() -> None:
    """Keep transformers' own notices and progress bars out of the way of ours."""
    from transformers.utils import logging as transformers_logging

    quiet: Any = transformers_logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    # It has a handler of its own; without this each of its retries is told twice.
    logging.getLogger("huggingface_hub").propagate = False
