"""Options that several commands share, and what they mean."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MODEL = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, or a model's name on the Hugging Face hub.",
        show_default=False,
        metavar="MODEL",
    ),
]
DEVICE = Annotated[
    str, typer.Option(help="Where the model computes: auto, cpu or cuda.", metavar="NAME")
]
DTYPE = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.", metavar="NAME"),
]
QUANTIZE = Annotated[
    Literal["int4", "mxfp4", "fp8", "int8"] | None,
    typer.Option(
        help="Quantise experts when they are packed: int4, mxfp4, fp8 or int8. Approximates.",
        metavar="NAME",
        show_default=False,
    ),
]
STORE = Annotated[Literal["auto", "ram", "disk"], typer.Option(help="Where all experts live.")]
STORE_DIR = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the expert store on disk. By default under the user's cache folder.",
        show_default=False,
    ),
]
EXPERT_CACHE = Annotated[
    str,
    typer.Option(
        help='Memory for experts in the fast tier: "25%" of all experts, "8GiB", "500MB", bytes.',
        metavar="SIZE",
    ),
]
KV_CACHE = Annotated[
    Literal["static", "dynamic"],
    typer.Option(help="static compiles one decode graph; dynamic has no longest length."),
]
COMPILE_OPTION = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-O",
        help='Option of torch.compile(backend="specmoe"), such as -O prefetch=false. Repeatable.',
        metavar="NAME=VALUE",
        show_default=False,
    ),
]
ADAPTER = Annotated[
    str | None,
    typer.Option(
        help="A LoRA adapter (PEFT) to merge: its folder, or its name on the hub.",
        show_default=False,
        metavar="PATH",
    ),
]
MISSING_WEIGHTS = Annotated[
    Literal["error", "random"],
    typer.Option(help="Weights that the checkpoint lacks: error names them, random draws them."),
]
THREADS = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, help="PyTorch's threads. By default its own choice.", show_default=False
    ),
]
JSON = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result here, as JSON.", show_default=False),
]
DEBUG = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error, and debug messages.")
]

_LARGEST_NUMBER = 2**31 - 1
_ANY_64_BITS = ("seed",)


def require_compiler(device: str, options: Mapping[str, Any]) -> None:
    """Raise before anything is loaded if what compiles for a device is missing.

    Args:
        device: the value of --device.
        options: of `torch.compile(backend="specmoe")`.

    Raises:
        FileNotFoundError: there is no compiler.
    """
    import torch

    from specmoe_compile.system.compilers import check_compiler

    if options.get("lowering") == "eager":
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    check_compiler("cuda" if on_gpu else "cpu")


def checked_numbers(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that a number beyond all use is refused before it begins."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, value in values.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, float) and not abs(value) <= _LARGEST_NUMBER:  # NaN too
                raise ValueError(f"{option} {value} is not a number that it can have.")
            largest = 2**63 - 1 if name in _ANY_64_BITS else _LARGEST_NUMBER
            if isinstance(value, int) and abs(value) > largest:
                raise ValueError(f"{option} {value} is too large: give at most {largest}.")
        command(**values)

    return run


def check_no_value_is_empty(arguments: Sequence[str]) -> None:
    """Raise `ValueError` for an empty argument, as an unset shell variable leaves behind.

    An empty path would mean the current folder.
    """
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument == "" and index:
            name = arguments[index - 1]
        elif not (equals and not value and name.startswith("--") and " " not in name):
            continue
        what = name if name.startswith("-") else "An argument"
        raise ValueError(f"{what} is empty: give it a value, or leave it out.")


def compile_options(assignments: Sequence[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE pairs: VALUE is JSON (true, 2, [0, 1]), or a plain word.

    Raises:
        ValueError: not a pair, an unknown option, or a value that is not valid.
    """
    from specmoe_compile.options import CompileOptions

    options: dict[str, Any] = {}
    for assignment in assignments or ():
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--option {assignment!r} is not NAME=VALUE, such as prefetch=false.")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    CompileOptions.from_kwargs(options)
    return options
