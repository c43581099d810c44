"""Commands under torchrun: which of them several processes may run; the first one speaks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from specmoe_compile.system.launched import launched

RANKED = ("generate", "bench", "eval")


def check_command(name: str | None) -> None:
    """Raise `ValueError` for a command that torchrun started in several processes in vain."""
    size = launched().size
    if size > 1 and name is not None and name not in RANKED:
        raise ValueError(
            f"specmoe {name} runs in one process, but {size} were started: leave out torchrun."
            f" Those that split a model over processes are {', '.join(RANKED)}."
        )


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Let only rank 0 print; what it prints and writes is for all. Errors come after this."""
    if launched().rank == 0:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def speaker() -> str:
    """Who complains: "specmoe", with its rank where it is not the first."""
    try:
        rank = launched().rank
    except ValueError:
        rank = 0
    return f"specmoe (rank {rank})" if rank else "specmoe"


def first_ranks(path: Path | None) -> Path | None:
    """A file to write, on the first rank; None on the others."""
    return path if launched().rank == 0 else None


def refuse_on_ranks(option: str, given: object, why: str) -> None:
    """Raise `ValueError` if an option is given that several processes cannot follow."""
    size = launched().size
    if size > 1 and given:
        raise ValueError(f"{option} is for one process, but {size} were started: {why}.")
