"""The peers of `specmoe bench`: the same weights, run without specmoe, give the same tokens."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe_compile.bench import peer_files
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.peer_files import peer_file
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.bench.worker import disk_read_bytes_or_none
from specmoe_compile.errors import SpecMoEError
from tests.helpers import save_tiny

PROMPT = [5, 6, 7, 8]
NEW_TOKENS = 12
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the extra peers: gguf and llama-cpp-python",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def job_of(arm: str, checkpoint: Path, work_dir: Path, **changes: Any) -> ArmJob:
    values: dict[str, Any] = {
        "arm": arm,
        "model": str(checkpoint),
        "prompts": [PROMPT],
        "new_tokens": NEW_TOKENS,
        "device": "cpu",
        "dtype": "float32",
        "store_dir": str(work_dir / "store"),
        "work_dir": str(work_dir),
    }
    return ArmJob(**{**values, **changes})


def generate(arm: str, checkpoint: Path, work_dir: Path) -> tuple[list[int], torch.Tensor]:
    loaded = ARMS[arm].load(job_of(arm, checkpoint, work_dir), ARMS[arm])
    generator = loaded.generator or HuggingFaceGenerator(loaded.model, loaded.inner, {})
    clock = TokenClock()
    tokens, logits = generator.generate(PROMPT, NEW_TOKENS, clock, keep_logits=True)
    assert clock.ttft_ms is not None
    assert len(clock.intervals_ms) == NEW_TOKENS - 1
    return tokens, torch.as_tensor(logits)


@pytest.fixture(scope="module")
def expected(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[int], torch.Tensor]:
    return generate("eager", checkpoint, tmp_path_factory.mktemp("eager"))


@pytest.mark.parametrize("arm", ["mmap", "accelerate_cpu"])
def test_a_peer_gives_the_unmodified_models_logits(
    arm: str, checkpoint: Path, tmp_path: Path, expected: tuple[list[int], torch.Tensor]
) -> None:
    tokens, logits = generate(arm, checkpoint, tmp_path)
    assert tokens == expected[0]
    # Mapped weights start where the file has them, not at a multiple of 64 bytes: sums of float32
    # are vectorised from another element on.
    assert torch.allclose(logits, expected[1], atol=1e-4, rtol=1e-4)


@needs_llama_cpp
def test_llama_cpp_gives_the_unmodified_models_tokens(
    checkpoint: Path, tmp_path: Path, expected: tuple[list[int], torch.Tensor]
) -> None:
    tokens, logits = generate("llama_cpp", checkpoint, tmp_path)
    assert tokens == expected[0]
    assert logits.shape == expected[1].shape
    # Another engine sums in another order, through three layers of float32.
    assert torch.allclose(logits, expected[1], atol=1e-3, rtol=1e-3)


@needs_llama_cpp
def test_llama_cpp_stops_where_it_is_told_to(checkpoint: Path, tmp_path: Path) -> None:
    loaded = ARMS["llama_cpp"].load(job_of("llama_cpp", checkpoint, tmp_path), ARMS["llama_cpp"])
    assert loaded.generator is not None
    stop_at = len(PROMPT) + 3
    tokens, logits = loaded.generator.generate(PROMPT, 12, TokenClock(), stop_at=stop_at)
    assert (len(tokens), logits) == (3, None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_parameters_of_mmap_lie_in_its_file_and_nowhere_else(
    checkpoint: Path, tmp_path: Path
) -> None:
    job = job_of("mmap", checkpoint, tmp_path)
    loaded = ARMS["mmap"].load(job, ARMS["mmap"])
    path = str(peer_file(job))
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path)
    ]
    for name, parameter in loaded.inner.named_parameters():
        address = parameter.data_ptr()
        assert any(start <= address < end for start, end in mapped), name


def test_a_peers_file_is_made_once_and_follows_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", layers=1)
    made: list[Path] = []

    def write(folder: Path, dtype: str, path: Path) -> None:
        made.append(path)
        path.write_bytes(b"x")

    monkeypatch.setattr(peer_files, "WRITERS", {"mmap": (".mapped", write)})
    first = peer_file(job_of("mmap", folder, tmp_path))
    assert peer_file(job_of("mmap", folder, tmp_path)) == first
    assert len(made) == 1
    save_tiny(folder, layers=2)
    assert peer_file(job_of("mmap", folder, tmp_path)) != first
    assert len(made) == 2


def test_a_peers_file_that_fails_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, dtype: str, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peer_files, "WRITERS", {"mmap": (".mapped", write)})
    with pytest.raises(OSError, match="No space left"):
        peer_file(job_of("mmap", checkpoint, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reads a checkpoint folder, and 'some/model' is none"):
        peer_file(job_of("mmap", Path("some/model"), tmp_path))


def test_llama_cpp_without_its_packages_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SpecMoEError, match=r"pip install 'specmoe-compile\[peers\]'"):
        ARMS["llama_cpp"].load(job_of("llama_cpp", checkpoint, tmp_path), ARMS["llama_cpp"])
    with pytest.raises(SpecMoEError, match=r"pip install 'specmoe-compile\[peers\]'"):
        peer_file(job_of("llama_cpp", checkpoint, tmp_path))


@needs_llama_cpp
def test_gguf_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", layers=1)
    config = (folder / "config.json").read_text().replace('"qwen3_moe"', '"mixtral"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"converts qwen3_moe checkpoints, and model is mixtral"):
        peer_file(job_of("llama_cpp", folder, tmp_path))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs I/O accounting")
def test_disk_reads_of_a_process_are_counted(tmp_path: Path) -> None:
    """Only what comes from the disk: the file is written, dropped from the cache, and read."""
    from specmoe_compile.bench.page_cache import drop_pages

    path = tmp_path / "data"
    path.write_bytes(b"x" * (4 << 20))
    drop_pages([path])
    before = disk_read_bytes_or_none()
    path.read_bytes()
    between = disk_read_bytes_or_none()
    path.read_bytes()
    assert before is not None and between is not None
    if between == before:
        pytest.skip("this file system has no block device")
    assert between - before >= 4 << 20
    assert disk_read_bytes_or_none() == between
