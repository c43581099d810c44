"""A worker process that stays alive between its turns, and the parent's side of its talk.

Start-up (imports, loading, tracing) takes far longer than a turn. A worker that is ready blocks on
its standard input and computes nothing, so that several may be ready while one is measured.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from specmoe_compile.bench.child import ChildPython, Hears
from specmoe_compile.bench.memory_cap import MemoryCap
from specmoe_compile.bench.page_cache import drop_cached_pages, drop_pages
from specmoe_compile.bench.records import ArmJob, ArmRun

WORKER = "specmoe_compile.bench.worker"


class LiveWorker:
    """One worker process: start it, wait until it is ready, give it turns, end it.

    `close` ends it in any case.
    """

    def __init__(
        self,
        job: ArmJob,
        *,
        cap: MemoryCap | None = None,
        on_event: Hears | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Start the process; it loads, compiles and warms up meanwhile.

        Args:
            job: what each turn measures.
            cap: memory limit that it lives in.
            on_event: hears what the worker tells.
            environment: on top of this process's.
            timeout_s: longest start-up, and longest turn; None waits for ever.
        """
        self._stack = contextlib.ExitStack()
        with self._stack:
            folder = Path(
                self._stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="specmoe-arm-", dir=job.work_dir)
                )
            )
            job_path, self._result_path = folder / "job.json", folder / "result.json"
            job = replace(job, work_dir=str(folder), started_s=time.time())
            job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
            drop_cached_pages(Path(job.model))
            if job.peer_file is not None:
                drop_pages([Path(job.peer_file)])
            self._child = self._stack.enter_context(
                contextlib.closing(
                    ChildPython(
                        ["-m", WORKER, str(job_path)],
                        cap=cap,
                        on_event=on_event,
                        environment=environment,
                        timeout_s=timeout_s,
                    )
                )
            )
            self._stack = self._stack.pop_all()

    def close(self) -> None:
        """End the process, gently or not."""
        self._stack.close()

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self) -> None:
        """Wait until it is loaded, compiled and warm.

        Raises:
            ArmFailedError: the process was killed or gave up; the message says why.
            ArmInputError: the process refused what it was asked to do.
        """
        self._child.wait_for("ready")

    def turn(self, *, warm_up: bool = False) -> ArmRun:
        """Generate the job's prompts once and return what was measured.

        Args:
            warm_up: repeat the warm-up first, for a worker that has been idle.

        Raises:
            ArmFailedError, ArmInputError: as `wait_ready`.
        """
        command = {"result": str(self._result_path), "warm_up": warm_up}
        self._child.tell(json.dumps(command))
        self._child.wait_for("measured")
        return ArmRun(**json.loads(self._result_path.read_text(encoding="utf-8")))

    def finish(self) -> None:
        """End it and wait for a good end.

        Raises:
            ArmFailedError, ArmInputError: as `wait_ready`.
        """
        self._child.finish()


def run_worker(
    job: ArmJob,
    *,
    cap: MemoryCap | None = None,
    on_event: Hears | None = None,
    environment: Mapping[str, str] | None = None,
) -> ArmRun:
    """Measure one job in a fresh process, in its only turn, and return what it measured.

    Raises:
        ArmFailedError: the process was killed or gave up; the message says why.
        ArmInputError: the process refused what it was asked to do.
    """
    live = LiveWorker(job, cap=cap, on_event=on_event, environment=environment)
    with contextlib.closing(live) as worker:
        worker.wait_ready()
        run = worker.turn()
        worker.finish()
    return run
