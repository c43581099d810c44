"""One of two processes that add up through memory that both have mapped: `sum_pair.py FOLDER RANK`.

Both run the kernel in Triton's interpreter, as the test that starts them does; what a GPU reaches
over a link is a file here.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import tests.kernels.conftest  # noqa: F401  # bfloat16 as a GPU rounds it
from specmoe_compile.kernels.sum_ranks.inbox import letter_count, make_inbox
from specmoe_compile.kernels.sum_ranks.kernel import launch_sum_ranks

ROUNDS = 40
SIZES = (2, 256, 300, 700)


def mapped(folder: Path, rank: int) -> torch.Tensor:
    """The letters of a rank, the same memory in both processes."""
    count = letter_count(2)
    return torch.from_file(
        str(folder / f"letters{rank}"), shared=True, size=count, dtype=torch.int64
    )


def main(folder: Path, rank: int) -> None:
    """Add up, and keep what was given and found."""
    letters = [mapped(folder, each) for each in range(2)]
    inbox = make_inbox(rank, letters[rank], [each.data_ptr() for each in letters])
    (folder / f"ready{rank}").touch()
    while not (folder / f"ready{1 - rank}").exists():
        time.sleep(0.01)
    generator = torch.Generator().manual_seed(rank)
    found = []
    for number in range(ROUNDS):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        part = torch.randn(SIZES[number % len(SIZES)], generator=generator).to(dtype)
        out = torch.full_like(part, float("nan"))
        if number % 5 == rank:
            time.sleep(0.02)  # the other one waits
        launch_sum_ranks(
            part.view(torch.int32), out.view(torch.int32), inbox, str(dtype).removeprefix("torch.")
        )
        found.append({"part": part, "out": out})
    torch.save(found, folder / f"sums{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
