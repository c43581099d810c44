"""Gives arms their turns on one machine, each in a process that stays alive, forth and back.

A machine's speed drifts within minutes. Turns of some seconds, many of them, hit all arms alike,
and an arm's start-up is paid once. What an arm learns while it runs is kept from turn to turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from specmoe_compile.cli.measure.live_worker import IdleWatch, LiveWorker
from specmoe_compile.cli.measure.records import ArmJob, ArmRun, quantile

IDLE_LIMIT_S = 10.0


def run_turns(jobs: Mapping[str, ArmJob], rounds: int) -> dict[str, list[ArmRun]]:
    """Measure every job once per round, every second round backwards; returns runs by name.

    The first round is not kept: what pays is found out in it.

    Raises:
        ArmFailedError, ArmInputError: see `LiveWorker`.
    """
    runs: dict[str, list[ArmRun]] = {name: [] for name in jobs}
    with contextlib.ExitStack() as stack:
        workers: dict[str, LiveWorker] = {}
        for name, job in jobs.items():
            workers[name] = stack.enter_context(contextlib.closing(LiveWorker(job)))
            workers[name].wait_ready()
        for number in range(rounds + 1):
            for name in jobs if number % 2 == 0 else reversed(jobs):
                others = [worker for other, worker in workers.items() if other != name]
                IdleWatch(others).wait_idle(limit_s=IDLE_LIMIT_S)
                run = workers[name].turn()
                if number:
                    runs[name].append(run)
            if number:
                medians = (quantile(runs[name][-1].tpot_samples_ms, 0.5) for name in jobs)
                print(f"{number}/{rounds}", *(f"{ms:.1f}" for ms in medians), flush=True)
        for worker in workers.values():
            worker.finish()
    return runs
