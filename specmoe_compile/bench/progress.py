"""How far `specmoe bench` is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

_LINE_EVERY_S = 10.0


class BenchProgress:
    """All arms and repeats on standard error.

    Where that is no terminal, a line says when an arm goes on to something else, and every ten
    seconds how many tokens there are.
    """

    def __init__(self, jobs: Sequence[Any], repeats: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._repeats = repeats
        self._places = {job.arm: place for place, job in enumerate(jobs)}
        self._tokens = {job.arm: len(job.prompts) * job.new_tokens for job in jobs}
        console = Console(stderr=True)
        self._lines = not console.is_terminal
        self._began = self._told_at = time.monotonic()
        self._told: tuple[Any, ...] = ()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=self._lines,
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
        description = f"{job.arm} ({repeat + 1}/{self._repeats}): {what}"
        if self._lines:
            self._tell((job.arm, repeat, event["event"]), description)
        self._bar.update(self._task, completed=runs_done + share, description=description)

    def _tell(self, state: tuple[Any, ...], description: str) -> None:
        now = time.monotonic()
        if state == self._told and now - self._told_at < _LINE_EVERY_S:
            return
        self._told, self._told_at = state, now
        print(f"specmoe: {description}, after {now - self._began:.0f} s", file=sys.stderr)
