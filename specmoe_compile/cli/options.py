"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
    str,
    typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.", metavar="NAME"),
]
QUANTIZE = Annotated[
    str | None,
    typer.Option(
        help="Quantise experts when they are packed: int4, mxfp4, fp8 or int8. Approximates.",
        metavar="NAME",
        show_default=False,
    ),
]
STORE = Annotated[
    str,
    typer.Option(help="Where all experts live: auto, ram or disk.", metavar="TIER"),
]
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
    str,
    typer.Option(
        help="static compiles one decode graph; dynamic has no longest length.",
        metavar="static|dynamic",
    ),
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
    str,
    typer.Option(
        help="Weights that the checkpoint lacks: error names them, random draws them.",
        metavar="error|random",
    ),
]
THREADS = Annotated[
    int | None,
    typer.Option(min=1, help="PyTorch's threads. By default its own choice.", show_default=False),
]
JSON = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result here, as JSON.", show_default=False),
]
DEBUG = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error, and debug messages.")
]

QUANTIZED = ("int4", "mxfp4", "fp8", "int8")  # without torch, which takes a second to import
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_choice(option: str, value: str, choices: Sequence[str]) -> str:
    """Return `value`; raises `ValueError` if it is none of the choices."""
    if value not in choices:
        raise ValueError(f"--{option} {value!r} is not valid: choose {', '.join(choices)}.")
    return value


def check_dtype(value: str) -> str:
    """Return a dtype's name; raises `ValueError` if specmoe has no such dtype."""
    return check_choice("dtype", value, _DTYPES)


def check_quantize(value: str | None) -> str | None:
    """Return what `quantize=` can be; raises `ValueError` for anything else."""
    return None if value is None else check_choice("quantize", value, QUANTIZED)


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
