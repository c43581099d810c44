"""The progress bar of `specmoe bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class BenchProgress:
    """A progress bar over all arms and repeats, on standard error."""

    def __init__(self, jobs: Sequence[Any], repeats: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._repeats = repeats
        self._places = {job.arm: place for place, job in enumerate(jobs)}
        self._tokens = {job.arm: len(job.prompts) * job.new_tokens for job in jobs}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=float(len(jobs) * repeats))

    def __enter__(self) -> BenchProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_event(self, job: Any, repeat: int, event: Mapping[str, Any]) -> None:
        runs_done = repeat * len(self._places) + self._places[job.arm]
        share, what = 0.0, event["event"]
        if what == "tokens":
            share = event["done"] / self._tokens[job.arm]
            what = f"{event['done']} of {self._tokens[job.arm]} tokens"
        elif what == "finished":
            share = 1.0
        self._bar.update(
            self._task,
            completed=runs_done + share,
            description=f"{job.arm} ({repeat + 1}/{self._repeats}): {what}",
        )
