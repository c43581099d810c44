"""What `benchmarks.cpu_disk.run` runs: in each phase the arms, cache sizes and memory caps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specmoe_compile.system.sizes import parse_size

SIZES = ("5%", "10%", "25%", "50%", "100%")
OURS = ("cache", "specmoe")
PEERS = ("mmap", "llama_cpp")
SENTINEL = "cache"
SENTINEL_SIZE = "25%"
NO_SIZE = "none"
"""What stands for the cells without a cache size where sizes are asked for."""
ALONE = ("engine", "large")
"""Phases that run only where they are asked for."""
PREDICTS: tuple[tuple[str, Any], ...] = (("prefetch", True),)
"""Option of the cells of arm `specmoe`: on a CPU it predicts where it is told to."""
BASE_CAP_BYTES = 500 << 20
"""Memory besides the cache: Python, PyTorch, the model's other weights."""
SLOW_TOKENS = 16
"""Tokens per prompt of the cells that take a third of a second and more for each."""
SLOW_ARMS = ("accelerate", "accelerate_auto")
SLOW_PEER_SHARE = 0.25
"""Peers that map their weights are slow under a cap for a cache up to this share of the experts."""
KEPT_ALIVE = {
    "on_demand": 0,
    "cache": 0,
    "specmoe": 0,
    "default_vector": 0,
    "commit": 0,
    "resident": 1,
    "eager": 2,
    "accelerate_cpu": 2,
}
"""Arms whose process may wait beside another that is measured, and copies of all experts in it.

They keep experts in memory of their own, or read them past the page cache. The others live on the
page cache, which is charged to the process that touches it first: one process for each turn.
"""
WORKER_BYTES = 700 << 20
"""Memory of a process besides its experts, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing that is timed: an arm, with a cache size and a memory cap.

    Attributes:
        arm: name in `arms.ARMS`.
        size: of the expert cache, and what the cap leaves for one; None where neither counts.
        capped: whether memory is limited to `program_bytes` and the cache.
        options: over the arm's, and over `PREDICTS`.
        label: of the options, for tables.
        program_bytes: of the limit, what is for all but the cache.
    """

    arm: str
    size: str | None = None
    capped: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    program_bytes: int = BASE_CAP_BYTES

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = [self.arm, self.label, self.size or ""]
        return " ".join(part for part in parts if part) + (", capped" if self.capped else "")

    @property
    def all_options(self) -> dict[str, Any]:
        """Options over the arm's."""
        return dict(PREDICTS if self.arm == "specmoe" else ()) | dict(self.options)

    @property
    def slow(self) -> bool:
        """Whether it generates `SLOW_TOKENS` per prompt only."""
        if self.arm in SLOW_ARMS:
            return True
        mapped = self.arm in PEERS and self.capped and self.size is not None
        return mapped and sort_share(self.size) <= SLOW_PEER_SHARE

    @property
    def kept_alive(self) -> bool:
        """Whether its process may stay alive between its turns."""
        return self.arm in KEPT_ALIVE

    def ram_bytes(self, expert_bytes: int) -> int:
        """Memory of a process of this cell, at most, for an arm that is kept alive."""
        cached = 0 if self.size is None else parse_size(self.size, total_bytes=expert_bytes)
        return WORKER_BYTES + max(cached, KEPT_ALIVE[self.arm] * expert_bytes)

    def cap_bytes(self, expert_bytes: int) -> int | None:
        """Limit of memory, page cache included."""
        if not self.capped or self.size is None:
            return None
        return self.program_bytes + parse_size(self.size, total_bytes=expert_bytes)


def sort_share(size: str | None) -> float:
    """A size as a share of the experts, 0..1; one without a size comes first."""
    return -1.0 if size is None else float(size.removesuffix("%")) / 100


def smallest_size(model: Mapping[str, Any]) -> str:
    """The smallest cache that is not refused: one token's experts in every layer."""
    share = model["top_k"] / min(model["experts"])
    return f"{100 * share:g}%"


def sizes_of(model: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Sizes that specmoe refuses for this model, and those that it takes, smallest first."""
    least = smallest_size(model)

    refused = [size for size in SIZES if sort_share(size) < sort_share(least)]
    taken = [size for size in SIZES if sort_share(size) > sort_share(least)]
    return refused, [least, *taken]


def phase_cells(phase: str, model: Mapping[str, Any]) -> list[Cell]:
    """The cells of a phase, in order; `resident`, what computing alone takes, is in each."""
    refused, taken = sizes_of(model)
    least, *larger = taken
    if phase == "tight":
        return [
            Cell(arm="on_demand", size=least, capped=True),
            *(Cell(arm=arm, size=size, capped=True) for size in refused for arm in PEERS),
            *(Cell(arm=arm, size=least, capped=True) for arm in (*OURS, *PEERS)),
            Cell(arm="resident"),
        ]
    if phase == "roomy":
        full = larger[-1]
        partial = larger[:-1]
        return [
            *(Cell(arm=a, size=s, capped=True) for s in partial for a in (*OURS, *PEERS)),
            *(Cell(arm="accelerate_auto", size=s, capped=True) for s in partial),
            Cell(arm="accelerate", size=SENTINEL_SIZE, capped=True),
            *(Cell(arm=arm, size=full, capped=True) for arm in ("specmoe", *PEERS)),
            Cell(arm="resident"),
        ]
    if phase == "uncapped":
        size = SENTINEL_SIZE
        return [
            *(Cell(arm=arm) for arm in ("eager", "accelerate_cpu", "accelerate", *PEERS)),
            Cell(arm="on_demand"),
            *(Cell(arm=arm, size=size) for arm in (*OURS, "default_vector", "commit")),
            # Without it the layers whose prefetches do not pay are not predicted, nor counted.
            Cell(arm="specmoe", size=size, options=(("auto_off", False),), label="always"),
            Cell(arm="resident"),
        ]
    if phase in ALONE:
        shares = [size for size in taken if sort_share(size) <= 0.5]
        if phase == "large":
            arms = ("cache", "llama_cpp")
            return [Cell(arm=a, size=s, capped=True) for s in shares for a in arms]
        return [
            *(Cell(arm=arm) for arm in ("resident", "eager", "llama_cpp")),
            *(Cell(arm=a, size=s, capped=True) for s in shares for a in (*OURS, "llama_cpp")),
            Cell(arm="accelerate", size=SENTINEL_SIZE, capped=True),
            Cell(arm="specmoe", size=larger[-1], capped=True),
        ]
    raise ValueError(f"There is no phase {phase!r}.")


def dry_cells(phase: str) -> list[Cell]:
    """A few cells of each kind, for a test."""
    return {
        "tight": [Cell(arm="mmap", size="5%", capped=True), Cell(arm="resident")],
        "roomy": [Cell(arm="cache", size="50%", capped=True), Cell(arm="resident")],
        "uncapped": [
            Cell(arm="eager"),
            Cell(arm="specmoe", size="50%", options=(("auto_off", False),), label="always"),
            Cell(arm="resident"),
        ],
        "engine": [Cell(arm="cache", size="50%", capped=True), Cell(arm="resident")],
        "large": [Cell(arm="cache", size="50%", capped=True)],
    }[phase]


def chosen_cells(cells: Sequence[Cell], sizes: Sequence[str] | None) -> list[Cell]:
    """The cells of some sizes, and `resident` with them; all of them for None.

    Raises:
        ValueError: no cell has one of these sizes.
    """
    if sizes is None:
        return list(cells)
    known = {cell.size or NO_SIZE for cell in cells}
    for size in sizes:
        if size not in known:
            raise ValueError(f"--sizes: no cell has {size!r}, give some of {sorted(known)}.")
    return [c for c in cells if (c.size or NO_SIZE) in sizes or c.arm == "resident"]


def sentinel(phase: str, cells: Sequence[Cell]) -> Cell:
    """The cell that runs at the start, in the middle and at the end of a phase."""
    if phase in ALONE:
        return next((cell for cell in cells if cell.arm == "resident"), cells[0])
    return Cell(arm=SENTINEL, size=SENTINEL_SIZE, capped=phase != "uncapped")


def order_of(cells: Sequence[Cell], passes: int) -> list[list[int]]:
    """Indices of the cells for each pass: there and back, so that drift hits all alike."""
    forward = list(range(len(cells)))
    return [forward if turn % 2 == 0 else forward[::-1] for turn in range(passes)]
