"""Text of the reference model: the Python standard library's sources, as bytes.

Shapes: N windows, W tokens per window (inputs and targets overlap, so a window holds W + 1).
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.reference_model.tokenizer import EOS_ID, PAD_ID

# Whole modules that training never sees, by path below the source folder. Their tests and their
# generated documentation would leak them, hence the name rule in `is_held_out`.
HELD_OUT_FILES = (
    "argparse.py",
    "heapq.py",
    "shutil.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
)
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
MAX_FILE_BYTES = 400_000  # larger ones are generated tables, not written code


def default_source() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative: Path) -> bool:
    """Say whether a source file is held out, or is the test of a file that is."""
    if relative.as_posix() in HELD_OUT_FILES:
        return True
    stem = relative.stem.removeprefix("test_")
    return stem != relative.stem and any(stem == Path(name).stem for name in HELD_OUT_FILES)


def training_files(source: Path, *, include_tests: bool = False) -> list[Path]:
    """List the source files that training reads, sorted by path.

    Args:
        source: folder of a Python standard library.
        include_tests: also read `test`, `tests` and `idle_test` folders.

    Returns:
        Absolute paths; held-out files, installed packages and files above 400 kB left out.

    Raises:
        ValueError: the folder holds no Python source.
    """
    skipped = SKIPPED_FOLDERS if include_tests else SKIPPED_FOLDERS | TEST_FOLDERS
    files = []
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        if skipped.intersection(relative.parts) or is_held_out(relative):
            continue
        if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            files.append(path)
    if not files:
        raise ValueError(f"no Python source below {source}; name a standard library with --source")
    return files


def read_training_tokens(files: Sequence[Path]) -> torch.Tensor:
    """Read files into one stream, an end-of-text token before each and after the last.

    Files with the same content are read once.

    Returns:
        int16 tensor [tokens] on the CPU.
    """
    seen: set[bytes] = set()
    parts = [torch.tensor([EOS_ID], dtype=torch.int16)]
    for path in files:
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if not data or digest in seen:
            continue
        seen.add(digest)
        parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int16))
        parts.append(torch.tensor([EOS_ID], dtype=torch.int16))
    return torch.cat(parts)


def cut_windows(data: bytes, window: int) -> torch.Tensor:
    """Cut one text into windows such that each byte is a target exactly once.

    Args:
        data: the text.
        window: targets per window (W).

    Returns:
        int64 tensor [N, W + 1]; column 0 of the first row is the end-of-text token, the last row
        is filled up with the padding token.
    """
    stream = torch.cat(
        [torch.tensor([EOS_ID]), torch.frombuffer(bytearray(data), dtype=torch.uint8).long()]
    )
    count = -(-len(data) // window)
    padded = torch.full((count * window + 1,), PAD_ID, dtype=torch.int64)
    padded[: stream.numel()] = stream
    return padded.unfold(0, window + 1, window).contiguous()


def held_out_windows(
    source: Path, window: int, names: Sequence[str] = HELD_OUT_FILES
) -> torch.Tensor:
    """Return the held-out files as windows [N, W + 1], int64, padding in unfilled places.

    Raises:
        ValueError: a held-out file is missing from the source folder.
    """
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise ValueError(f"held-out files {', '.join(missing)} are missing from {source}")
    return torch.cat([cut_windows((source / name).read_bytes(), window) for name in names])


def sample_starts(
    num_tokens: int, *, window: int, steps: int, batch: int, seed: int
) -> torch.Tensor:
    """Draw where each training window starts: the data order is a function of the seed alone.

    Returns:
        int64 tensor [steps, batch] on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_tokens - window, (steps, batch), generator=generator)
