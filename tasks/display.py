"""What the terminal shows of a run: a bar with ETA and speed a stage, plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tasks.pace import Pace

_LINE_SECONDS = 15.0


class Display:
    """Progress of one run, by stage."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._bars = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._live = sys.stderr.isatty() and not quiet
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._last_line = 0.0
        if self._live:
            self._bars.start()

    @contextlib.contextmanager
    def stage(self, name: str, reason: str = "") -> Iterator[None]:
        """Show a stage's bar while it runs."""
        self._started[name] = time.monotonic()
        if self._live:
            self._tasks[name] = self._bars.add_task(name, total=None, unit="", speed="")
        else:
            self.console.print(f"{name}: started{f' ({reason})' if reason else ''}", highlight=False)
        yield
        seconds = time.monotonic() - self._started[name]
        if self._live:
            task = self._bars.tasks[self._tasks[name]]
            self._bars.update(task.id, total=task.total or 1, completed=task.total or 1)
        else:
            self.console.print(f"{name}: finished in {seconds:.0f} s")

    def skipped(self, name: str) -> None:
        """Say that a stage was finished before."""
        self.console.print(f"{name}: skipped, finished before")

    def update(self, name: str, done: int, total: int, *, unit: str = "images", note: str = "") -> None:
        """Position of a running stage; the speed counts from its first update."""
        now, pace = time.monotonic(), self._paces.setdefault(name, Pace())
        pace.move(done, total)
        speed = pace.speed
        text = ", ".join(part for part in (f"{speed:,.0f} {unit}/s" if speed else "", note) if part)
        if self._live and name in self._tasks:
            self._bars.update(self._tasks[name], completed=done, total=total, unit=unit, speed=text)
        elif now - self._last_line > _LINE_SECONDS:
            self._last_line = now
            eta = f", eta {pace.seconds_left:.0f} s" if pace.seconds_left is not None else ""
            self.console.print(f"{name}: {done:,}/{total:,} {unit}{', ' if text else ''}{text}{eta}")

    def close(self) -> None:
        """Stop drawing."""
        if self._live:
            self._bars.stop()
