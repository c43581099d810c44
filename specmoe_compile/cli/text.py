"""Text files as token windows.

Shape letters: N windows, W tokens per window.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

TEXT = Annotated[
    Path,
    typer.Option(
        "--text", help="A UTF-8 text file, like what the model will read.", show_default=False
    ),
]


def read_tokens(path: Path, tokenizer: Any) -> list[int]:
    """Token ids of a text file, without special tokens.

    Raises:
        ValueError: it is not UTF-8 text, or empty.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 text: {error.reason}.") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"--text {path} is empty: give a file with some text.")
    return ids


def windows(ids: list[int], *, count: int, length: int, path: Path) -> Tensor:
    """Spread `count` windows of `length` tokens evenly over a text.

    Args:
        ids: tokens of the text.
        count: N, at most; fewer where the text has not as many that do not overlap.
        length: W.
        path: the text's file, for the error.

    Returns:
        [N, W] int64, in the order of the text.

    Raises:
        ValueError: the text is shorter than one window.
    """
    import torch

    fitting = len(ids) // length
    if fitting == 0:
        raise ValueError(
            f"--text {path} has {len(ids)} tokens, fewer than one window of {length}: give more"
            " text, or a smaller --window."
        )
    count = min(count, fitting)
    # Gaps, not overlaps: what is left over is spread between the windows.
    starts = [index * (len(ids) - length) // max(1, count - 1) for index in range(count)]
    if count == 1:
        starts = [0]
    return torch.tensor([ids[start : start + length] for start in starts], dtype=torch.int64)
