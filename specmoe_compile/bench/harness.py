"""Runs arms in processes of their own, interleaved over repeats, and collects their records."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.child import ArmFailedError, run_python
from specmoe_compile.bench.live_worker import run_worker
from specmoe_compile.bench.memory_cap import MemoryCap, memory_cap
from specmoe_compile.bench.peer_files import MODULE as PEER_FILES
from specmoe_compile.bench.peer_files import WRITERS
from specmoe_compile.bench.records import ArmJob, ArmRun, arm_record
from specmoe_compile.system.launched import launched

OnEvent = Callable[[ArmJob, int, dict[str, Any]], None]
"""Called with the job, the repeat, and an event of the worker."""


@dataclass(slots=True, kw_only=True)
class ArmResults:
    """Repeats of one arm: what was measured, under which cap, and what went wrong."""

    runs: list[ArmRun] = field(default_factory=list)
    cgroup_peaks_bytes: list[int | None] = field(default_factory=list)
    memory_cap_bytes: int | None = None
    error: str | None = None


def run_arms(
    jobs: Sequence[ArmJob],
    *,
    repeats: int,
    memory_cap_bytes: int | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, ArmResults]:
    """Measure every job `repeats` times, one after the other: A B C A B C.

    An arm that fails is not repeated; the others go on.

    Args:
        jobs: one per arm.
        repeats: times that each arm is measured.
        memory_cap_bytes: limit for arms that can keep one, page cache included.
        on_event: hears what the workers tell.

    Raises:
        ArmInputError: an arm refused what it was asked to do.
        PermissionError: a cap is wanted and control groups are not permitted here.
    """
    results = {job.arm: ArmResults() for job in jobs}
    for repeat in range(repeats):
        for job in jobs:
            result = results[job.arm]
            if result.error is not None:
                continue
            cap_bytes = memory_cap_bytes if ARMS[job.arm].capped else None

            def tell(event: dict[str, Any], job: ArmJob = job, repeat: int = repeat) -> None:
                if on_event is not None:
                    on_event(job, repeat, event)

            try:
                with cap_or_nothing(cap_bytes) as cap:
                    run = run_worker(_named(job, repeat), cap=cap, on_event=tell)
                    result.runs.append(run)
                    if cap is not None:
                        result.memory_cap_bytes = cap.limit_bytes
                        result.cgroup_peaks_bytes.append(cap.peak_bytes_or_none())
            except ArmFailedError as error:
                result.error = str(error)
            tell({"event": "finished", "error": result.error})
    return results


def _named(job: ArmJob, repeat: int) -> ArmJob:
    """The job, with a name for the processes that run it together, if there are several."""
    return job if launched().size == 1 else replace(job, group=f"{job.arm} {repeat}")


def run_pack(
    model: str,
    store_dir: str | None,
    dtype: str,
    *,
    quantize: str | None = None,
    cap: MemoryCap | None,
    work_dir: str,
) -> dict[str, Any]:
    """Pack a model's store in a process of its own and return the JSON of `specmoe pack`.

    Raises:
        ArmFailedError, ArmInputError: as `run_worker`.
    """
    with tempfile.TemporaryDirectory(prefix="specmoe-pack-", dir=work_dir) as folder:
        result_path = Path(folder) / "pack.json"
        arguments = ["pack", model, "--dtype", dtype, "--json", str(result_path)]
        if quantize is not None:
            arguments += ["--quantize", quantize]
        if store_dir is not None:
            arguments += ["--store-dir", store_dir]
        # Under torchrun each rank comes here; the store's lock lets one of them pack.
        run_python(
            ["-m", "specmoe_compile.cli.main", *arguments],
            cap=cap,
            environment={"WORLD_SIZE": ""},
        )
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        return result


def with_peer_file(job: ArmJob) -> ArmJob:
    """Return the job with the file that its arm reads, made in a process of its own.

    A job whose arm reads the checkpoint or the store is returned as it is.

    Raises:
        ArmFailedError, ArmInputError: as `run_worker`.
    """
    if job.arm not in WRITERS:
        return job
    with tempfile.TemporaryDirectory(prefix="specmoe-peer-", dir=job.work_dir) as folder:
        job_path, result_path = Path(folder) / "job.json", Path(folder) / "path.json"
        job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        run_python(["-m", PEER_FILES, str(job_path), str(result_path)])
        return replace(job, peer_file=json.loads(result_path.read_text(encoding="utf-8")))


@contextlib.contextmanager
def cap_or_nothing(limit_bytes: int | None) -> Any:
    if limit_bytes is None:
        yield None
        return
    with memory_cap(limit_bytes) as cap:
        yield cap


def arm_records(results: Mapping[str, ArmResults]) -> list[dict[str, Any]]:
    """Records of the arms that were measured, in order; those that failed are left out."""
    return [
        arm_record(
            name,
            result.runs,
            memory_cap_bytes=result.memory_cap_bytes,
            cgroup_peaks_bytes=result.cgroup_peaks_bytes,
        )
        for name, result in results.items()
        if result.runs
    ]
