"""A higher limit of recompilations while an offloaded model runs.

Prefill, decode, each batch size and each kind of cache are graphs of their own; past Dynamo's
limit of 8 it would go on eagerly without a word.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

from torch._dynamo import config

RECOMPILE_LIMIT = 64

_mutex = threading.Lock()
_users = 0
_before = RECOMPILE_LIMIT


@contextlib.contextmanager
def raised_recompile_limit() -> Iterator[None]:
    """Let Dynamo recompile up to 64 times in this thread; a higher limit stays."""
    if _is_per_thread():
        before = config.recompile_limit
        if before >= RECOMPILE_LIMIT:
            yield
            return
        # As `config.patch` does it, which makes a class each time.
        config.recompile_limit = RECOMPILE_LIMIT
        try:
            yield
        finally:
            config.recompile_limit = before
        return
    _raise_for_all()
    try:
        yield
    finally:
        _restore_for_all()


@functools.cache
def _is_per_thread() -> bool:
    """Whether a setting of Dynamo is the thread's own; up to some version it was the process's."""
    seen: list[int] = []
    with config.patch(recompile_limit=config.recompile_limit + 1):
        changed = config.recompile_limit
        thread = threading.Thread(target=lambda: seen.append(config.recompile_limit))
        thread.start()
        thread.join()
    return seen != [changed]


def _raise_for_all() -> None:
    global _users, _before
    with _mutex:
        if _users == 0:
            _before = config.recompile_limit
            config.recompile_limit = max(_before, RECOMPILE_LIMIT)
        _users += 1


def _restore_for_all() -> None:
    global _users
    with _mutex:
        _users -= 1
        if _users == 0:
            config.recompile_limit = _before
