"""How a benchmark's command ends: a mistake of the caller's is one sentence and status 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from specmoe_compile.system.output import sentence, user_error_or_none

Main = Callable[[Sequence[str] | None], int]


def explains_errors(main: Main) -> Main:
    """Let a `main` return 2 for what a caller can correct, after a sentence on standard error."""

    @functools.wraps(main)
    def explained(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except Exception as error:
            known = user_error_or_none(error)
            if known is None:
                raise
            print(f"error: {sentence(known)}", file=sys.stderr)
            return 2

    return explained
