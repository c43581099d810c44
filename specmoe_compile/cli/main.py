"""Entry point of the command line: the commands, and what a mistake looks like.

A mistake that the caller can correct ends with status 2 and one sentence on standard error; nothing
is imported before it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from specmoe_compile.cli.bench import bench
from specmoe_compile.cli.calibrate import calibrate
from specmoe_compile.cli.demo import demo
from specmoe_compile.cli.doctor import doctor
from specmoe_compile.cli.evaluate import evaluate
from specmoe_compile.cli.generate import generate
from specmoe_compile.cli.options import DEBUG, check_no_value_is_empty, checked_numbers
from specmoe_compile.cli.pack import pack
from specmoe_compile.cli.ranks import check_command, first_rank_speaks, speaker
from specmoe_compile.cli.replay import replay
from specmoe_compile.cli.serve import serve
from specmoe_compile.system.output import sentence, user_error_or_none
from specmoe_compile.system.progress import progress_lines

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
BROKEN_PIPE_STATUS = 141

# Typer carries click inside itself from some version on; its errors are reached by way of a class
# that every version exports.
_CommandLineError: type[Any] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="specmoe",
    help="Run Mixture-of-Experts models whose experts do not fit the fast memory.",
    epilog=(
        "First time here? [bold]specmoe doctor[/bold] says what this machine can do, and"
        " [bold]specmoe demo[/bold] shows everything at work."
    ),
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from specmoe_compile import __version__

        print(f"specmoe {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: DEBUG = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
    check_command(context.invoked_subcommand)


for command in (demo, generate, serve, bench, pack, calibrate, replay, doctor):
    app.command()(checked_numbers(command))
app.command("eval")(checked_numbers(evaluate))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit status."""
    debug = "--debug" in arguments
    if debug:
        logging.getLogger("specmoe_compile").setLevel(logging.DEBUG)
    try:
        check_no_value_is_empty(arguments)
        with first_rank_speaks(), progress_lines():
            status = app(args=list(arguments), prog_name="specmoe", standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except _CommandLineError as error:
        # Typer says of pydantic's errors of which kind they are.
        _complain(error.format_message().replace("Value error, ", ""))
        return USER_ERROR_STATUS
    except typer.Abort:
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        return _nobody_reads()
    except Exception as error:
        known = user_error_or_none(error)
        if known is None:
            raise
        if debug:
            traceback.print_exc()
        _complain(sentence(known))
        return USER_ERROR_STATUS
    return status if isinstance(status, int) else 0


def _complain(message: str) -> None:
    print(f"{speaker()}: {sentence(ValueError(message))}", file=sys.stderr)


def _nobody_reads() -> int:
    """Whoever read our output has enough (`| head`): what is left of it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return BROKEN_PIPE_STATUS


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not UTF-8 shows what it can; a character that it lacks ends nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="specmoe: %(message)s", level=logging.WARNING)
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _nobody_reads()
    sys.exit(status)


if __name__ == "__main__":
    main()
