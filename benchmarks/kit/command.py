"""A benchmark's command: its parser, and how it ends.

A mistake of the caller's is one sentence and status 2.
"""

from __future__ import annotations

import argparse
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


def run_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks NAME`, which shows the description as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
