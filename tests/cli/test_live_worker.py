"""A worker that stays alive between its turns: real processes on a tiny checkpoint."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers

from benchmarks.cpu_disk import idle_watch
from benchmarks.cpu_disk.idle_watch import IdleWatch, cpu_s
from specmoe_compile.bench.child import ArmFailedError, ChildPython
from specmoe_compile.bench.live_worker import LiveWorker, run_worker
from specmoe_compile.bench.records import ArmJob
from tests.helpers import PATIENCE_S, greedy, save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def job_of(checkpoint: Path, work_dir: Path, **changes: Any) -> ArmJob:
    values: dict[str, Any] = {
        "arm": "cache",
        "model": str(checkpoint),
        "prompts": [[5, 6, 7], [8, 9]],
        "new_tokens": 6,
        "warmup_tokens": 3,
        "skip_tokens": 0,
        "device": "cpu",
        "dtype": "float32",
        "expert_cache": "50%",
        "store_dir": str(work_dir / "store"),
        "options": {"lowering": "eager"},
        "threads": 1,
        "work_dir": str(work_dir),
    }
    return ArmJob(**{**values, **changes})


@pytest.mark.parametrize("arm", ["eager", pytest.param("cache", marks=pytest.mark.slow)])
def test_turns_of_one_worker_give_the_models_tokens_and_it_idles_between(
    arm: str, checkpoint: Path, tmp_path: Path
) -> None:
    job = job_of(checkpoint, tmp_path, arm=arm)
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = [
        greedy(plain, torch.tensor([prompt]), job.new_tokens)[0, len(prompt) :].tolist()
        for prompt in job.prompts
    ]
    with closing(LiveWorker(job, timeout_s=PATIENCE_S)) as worker:
        worker.wait_ready()
        first = worker.turn()
        watch = IdleWatch([worker.pid])
        assert watch.wait_idle(limit_s=PATIENCE_S)
        time.sleep(0.5)
        # A process that spins gets more, however many others do.
        assert watch.share() < 0.2, "it waits, and does not spin"
        second = worker.turn(warm_up=True)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ArmFailedError, match=r"^The process was ended by SIGKILL\.$"):
            worker.turn()
    assert first.tokens == second.tokens == expected
    for run in (first, second):
        assert [len(run.ttft_samples_ms), len(run.tpot_samples_ms)] == [2, 10]
    # a turn counts for itself
    assert first.ttft_samples_ms != second.ttft_samples_ms
    if arm == "cache":
        assert not any("after the warm-up" in note for note in second.notes)
        runs = (run_worker(job), first, second)
        totals = [run.decode["total"] for run in runs if run.decode is not None]
        assert len(totals) == 3
        assert len({total["steps"] for total in totals}) == 1
        assert totals[0]["hits"] == totals[1]["hits"] > 0
    assert all(path.name == "store" for path in tmp_path.iterdir())


def test_a_worker_is_gone_after_an_exception(checkpoint: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        closing(LiveWorker(job_of(checkpoint, tmp_path))) as worker,
    ):
        raise KeyboardInterrupt
    assert not psutil.pid_exists(worker.pid)
    assert list(tmp_path.iterdir()) == []


def test_silence_is_bounded() -> None:
    child = ChildPython(["-c", "import time\nwhile True: time.sleep(60)"], timeout_s=0.3)
    with pytest.raises(ArmFailedError, match=r"no answer within 0\.3 s"):
        child.wait_for("ready")
    child.close()  # which does not wait for its end: that never comes
    assert not psutil.pid_exists(child.pid)


def test_what_a_process_computed_is_known() -> None:
    code = "import time\nwhile time.process_time() < 0.2: pass\n"
    code += 'print(\'{"event": "ready"}\', flush=True)\nimport sys; sys.stdin.read()'
    child = ChildPython(["-c", code], timeout_s=PATIENCE_S)
    try:
        child.wait_for("ready")
        assert cpu_s(child.pid) >= 0.15  # the kernel counts whole ticks
    finally:
        child.close()
    assert cpu_s(child.pid) == 0.0


@pytest.mark.parametrize(
    ("share", "until_s", "idle"), [(0.04, 1e9, True), (0.5, 1e9, False), (0.5, 1.0, True)]
)
def test_a_process_that_computes_is_not_idle(
    share: float, until_s: float, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(idle_watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    used = {1: lambda: share * min(clock[0], until_s), 2: lambda: 0.0}
    monkeypatch.setattr(idle_watch, "cpu_s", lambda pid: used[pid]())
    watch = IdleWatch([1, 2])
    assert watch.wait_idle(limit_s=5.0, sleep=sleep) is idle
    assert watch.share() == 0.0, "the watch begins anew"
    if idle:
        assert clock[0] == pytest.approx(0.2 if share < 0.1 else 1.2)
