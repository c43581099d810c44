"""`specmoe bench` and `specmoe generate` on a tiny checkpoint, arms as real processes."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.bench import harness
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.child import ArmFailedError, ArmInputError, run_python
from specmoe_compile.bench.harness import run_arms
from specmoe_compile.bench.page_cache import drop_cached_pages
from specmoe_compile.bench.progress import BenchProgress
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.bench.worker import Measurement
from specmoe_compile.cli.main import run
from specmoe_compile.hf.attach import session_of
from specmoe_compile.options import Policy
from tests.cli.test_records import SCHEMA_KEYS
from tests.helpers import save_tiny

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a byte tokenizer; its vocabulary holds bytes below 96."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    build_tokenizer(256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("FIRST PROMPT: 1 + 1 =\n---\nSECOND")
    return path


@pytest.fixture(scope="module")
def result(checkpoint: Path, prompt_file: Path, tmp_path_factory: Any) -> dict[str, Any]:
    """Two arms, through the command line, each in a process of its own."""
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "out.json"
    arguments = ["--arms", "eager,cache", "--new-tokens", "9", "--repeats", "1"]
    arguments += ["--prompt-file", str(prompt_file), "--store-dir", str(folder / "store")]
    arguments += ["-O", "lowering=eager", "--expert-cache", "50%", "--threads", "1"]
    arguments += ["--dtype", "float32", "--memory-cap", "4GiB", "--json", str(out)]
    assert run(["bench", str(checkpoint), *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_document_has_the_schema(result: dict[str, Any]) -> None:
    assert result["schema"] == 1
    assert {"commit", "machine", "versions", "model", "arms"} <= result.keys()
    assert [arm["name"] for arm in result["arms"]] == ["eager", "cache"]
    for arm in result["arms"]:
        assert arm.keys() >= SCHEMA_KEYS
        assert set(arm["tpot_ms"]) == {"p20", "p50", "p80"}
        assert 0 < arm["tpot_ms"]["p20"] <= arm["tpot_ms"]["p50"] <= arm["tpot_ms"]["p80"]
        assert re.fullmatch("[0-9a-f]{64}", arm["tokens_sha256"])
        # two prompts, 8 intervals each, 4 of them skipped
        assert arm["samples"] == 8
        assert arm["peak_rss_bytes"] > 1 << 20


def test_the_cache_arm_gives_the_unmodified_models_tokens_and_counts(
    result: dict[str, Any],
) -> None:
    eager, cache = result["arms"]
    assert cache["tokens_sha256"] == eager["tokens_sha256"]
    assert cache["compiled_graphs"] > 0
    # two prompts, 8 decode steps each, 3 layers
    assert cache["decode_steps"] == 2 * 8 * 3
    assert 0 < cache["hit_rate"] < 1
    assert cache["demand_bytes"] > 0
    assert cache["speculative_bytes"] == 0
    assert cache["fast_tier_bytes"] > 0
    assert (eager["policy"], cache["policy"]) == (None, "exact")
    assert (eager["hit_rate"], eager["stall_ms"]) == (None, None)


def test_the_document_names_the_model_but_no_folder(
    result: dict[str, Any], checkpoint: Path
) -> None:
    assert (result["model"]["moe_layers"], result["model"]["top_k"]) == (3, 2)
    assert result["prompts"]["count"] == 2
    assert str(checkpoint.parent) not in json.dumps(result)


@pytest.mark.usefixtures("prompts_left_to_the_model")
@pytest.mark.parametrize(
    "name",
    ["specmoe", "commit", *(pytest.param(n, marks=SLOW) for n in ("prefetch", "default_vector"))],
)
def test_speculating_arms_prefetch_under_their_policy(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    """In this process: an arm's own process is tested with the other arms."""
    job = ArmJob(
        arm=name,
        model=str(checkpoint),
        prompts=[],
        new_tokens=9,
        expert_cache="50%",
        store_dir=str(tmp_path / "store"),
        work_dir=str(tmp_path),
        device="cpu",
        options={"lowering": "eager", "auto_off": False, "prefetch": True},
    )
    loaded = ARMS[name].load(job, ARMS[name])
    ids = torch.tensor([[5, 6, 7]])
    static = {"cache_implementation": "static"}  # one graph, not two
    loaded.model.generate(ids, max_new_tokens=9, do_sample=False, **static)
    assert loaded.read_stats is not None
    stats = loaded.read_stats()
    assert stats.total.prefetches > 0
    assert stats.fast_tier_bytes < stats.store_bytes
    policy = session_of(loaded.inner).speculation.policy
    assert policy == ARMS[name].policy == (name if name in get_args(Policy) else "exact")


def test_a_cache_that_is_too_small_ends_the_bench_with_its_sentence(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the arm's process that says so; no store is needed for that."""
    monkeypatch.setattr(harness, "run_pack", lambda *_, **__: {"path": ""})
    arguments = ["--arms", "cache", "--expert-cache", "1%", "--store-dir", str(tmp_path / "s")]
    assert run(["bench", str(checkpoint), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("specmoe: expert_cache='1%'")


def test_arms_take_turns_and_one_that_fails_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def run_one(job: ArmJob, **_: Any) -> Any:
        ran.append(job.arm)
        if job.arm == "accelerate":
            raise ArmFailedError("no")
        return f"{job.arm} {len(ran)}"

    monkeypatch.setattr(harness, "run_worker", run_one)
    jobs: list[Any] = [
        ArmJob(arm=arm, model="m", prompts=[[1]], new_tokens=2, work_dir="w")
        for arm in ("eager", "accelerate", "cache")
    ]
    results = run_arms(jobs, repeats=2)
    assert ran == ["eager", "accelerate", "cache", "eager", "cache"]
    assert results["eager"].runs == ["eager 1", "eager 4"]
    assert results["cache"].runs == ["cache 3", "cache 5"]
    assert (results["accelerate"].runs, results["accelerate"].error) == ([], "no")


def test_an_arm_that_fails_does_not_stop_the_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is a real process, which leaves nothing behind; the other one is not."""
    run_worker = harness.run_worker

    def run_one(job: ArmJob, **kwargs: Any) -> Any:
        return "ran" if job.arm == "eager" else run_worker(job, **kwargs)

    monkeypatch.setattr(harness, "run_worker", run_one)
    jobs = [
        ArmJob(
            arm=arm,
            model=str(checkpoint),
            prompts=[[5, 6]],
            new_tokens=5,
            # no such precision of arithmetic: a bug's error, not a mistake with a sentence
            dtype="nonsense",
            work_dir=str(tmp_path),
        )
        for arm in ("accelerate", "eager")
    ]
    events: list[tuple[str, str]] = []
    results = run_arms(
        jobs,
        repeats=1,
        on_event=lambda job, repeat, event: events.append((job.arm, event["event"])),
    )
    assert results["accelerate"].error
    assert results["accelerate"].runs == []
    assert results["eager"].runs == ["ran"] and results["eager"].error is None
    assert events[0] == ("accelerate", "loading")
    assert events[-2:] == [("accelerate", "finished"), ("eager", "finished")]
    assert list(tmp_path.iterdir()) == []


def test_logits_are_saved_of_every_step_of_every_prompt(checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "logits.pt"
    job = ArmJob(
        arm="eager",
        model=str(checkpoint),
        prompts=[[5, 6], [7, 8, 9]],
        new_tokens=5,
        warmup_tokens=3,
        skip_tokens=0,
        save_logits=str(saved),
        dtype="float32",
        work_dir=str(tmp_path),
    )
    run_of_job = Measurement(job, emit=lambda event, **details: None).turn(warm_up=False)
    logits = torch.load(saved)
    assert logits.shape == (2, 5, 96)
    assert logits.dtype == torch.float32
    assert logits.argmax(-1).tolist() == run_of_job.tokens


def test_a_process_that_refuses_hands_its_sentence_on() -> None:
    code = "import sys; print('noise\\nspecmoe: Not so.', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ArmInputError, match=r"^Not so\.$"):
        run_python(["-c", code])


def test_a_process_that_is_killed_says_by_what() -> None:
    with pytest.raises(ArmFailedError, match="SIGKILL"):
        run_python(["-c", "import os; os.kill(os.getpid(), 9)"])


def test_a_process_that_ends_silently_says_its_status() -> None:
    with pytest.raises(ArmFailedError, match="status 3"):
        run_python(["-c", "raise SystemExit(3)"])


def test_generate_streams_the_unmodified_models_text(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(256)
    ids = tokenizer("HELLO", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 5:]
    out = tmp_path / "out.json"
    capsys.readouterr()
    arguments = ["--prompt", "HELLO", "--max-new-tokens", "12", "--no-compile", "--store", "disk"]
    arguments += ["--store-dir", str(tmp_path / "store"), "--expert-cache", "50%"]
    assert run(["generate", str(checkpoint), *arguments, "--json", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "HELLO" + tokenizer.decode(expected) + "\n"
    assert "12 tokens after a prompt of 5" in captured.err
    result = json.loads(out.read_text())
    assert result["tokens"] == expected.tolist()
    assert result["stats"]["misses"] > 0
    assert result["ttft_ms"] > 0


def test_a_chat_prompt_needs_a_chat_template(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(checkpoint), "--prompt", "HI", "--chat"]) == 2
    assert "chat template" in capsys.readouterr().err


def test_a_checkpoints_pages_leave_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by mapping the file: mincore says which of its pages are in memory.

    That those of another file stay is the kernel's to decide; it is not told to drop them.
    """
    told: list[str] = []
    advise = os.posix_fadvise

    def spy(fd: int, *arguments: int) -> None:
        told.append(os.readlink(f"/proc/self/fd/{fd}"))
        advise(fd, *arguments)

    monkeypatch.setattr(os, "posix_fadvise", spy)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * (1 << 20))
    other = tmp_path / "other.bin"
    other.write_bytes(b"x" * (1 << 20))
    for file in (path, other):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    drop_cached_pages(tmp_path)
    assert cached_pages(path) == 0
    assert told == [str(path)]


def cached_pages(path: Path) -> int:
    """Number of a file's 4 KiB pages that are in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        size = len(view)
        states = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(buffer := ctypes.c_char.from_buffer(view))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) == 0
        del buffer
        return sum(state & 1 for state in states)


def test_progress_that_no_terminal_shows_is_told_in_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    job = SimpleNamespace(arm="cache", prompts=["x"], new_tokens=8)
    with BenchProgress([job], repeats=2) as progress:
        events: list[tuple[float, int, dict[str, Any]]] = [
            (1.0, 0, {"event": "loaded"}),
            (2.0, 0, {"event": "tokens", "done": 1}),
            (3.0, 0, {"event": "tokens", "done": 2}),
            (13.0, 0, {"event": "tokens", "done": 3}),
            (14.0, 1, {"event": "tokens", "done": 4}),
        ]
        for now[0], repeat, event in events:
            progress.on_event(job, repeat, event)
    assert capsys.readouterr().err.splitlines() == [
        "specmoe: cache (1/2): loaded, after 1 s",
        "specmoe: cache (1/2): 1 of 8 tokens, after 2 s",
        "specmoe: cache (1/2): 3 of 8 tokens, after 13 s",
        "specmoe: cache (2/2): 4 of 8 tokens, after 14 s",
    ]
