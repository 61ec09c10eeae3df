"""Progress artifacts in Prefect: one a stage that takes long, with speed and time left, updated in the background."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator
from typing import Any, cast
from uuid import UUID

from prefect.context import FlowRunContext, TaskRunContext

from tasks.outbox import PROGRAMMING_ERRORS, Outbox
from tasks.pace import Pace

_EVERY = 5.0  # seconds between updates, and before the first: a short stage needs no bar
_LAST_SECONDS = 3.0  # for the last update of a stage


class ProgressPage:
    """The bars of one run. Outside of a flow run there are none; an API that does not answer is only a warning."""

    def __init__(self) -> None:
        self._bars: dict[str, _Bar] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show a stage's bar while it runs."""
        if FlowRunContext.get() is None and TaskRunContext.get() is None:
            yield
            return
        bar = self._bars[name] = _Bar(name)
        try:
            yield
            bar.end("finished")
        except BaseException:
            bar.end("stopped")
            raise
        finally:
            del self._bars[name]

    def update(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """Position of a running stage; returns at once."""
        if name in self._bars:
            self._bars[name].move(done, total, note)


class _Bar:
    """One stage's artifact; `send` publishes the newest state, whatever it was when it was asked to."""

    def __init__(self, stage: str) -> None:
        self._stage, self._note, self._state = stage, "", "running"
        self._pace = Pace()
        self._started = self._asked = time.monotonic()
        self._wanted = False
        self._artifact: UUID | None = None
        self._context = contextvars.copy_context()  # tells Prefect to which run the artifact belongs
        # Room for one that is being sent, with an older state, and one that will send the newest.
        self._outbox = Outbox[str]("progress", "Prefect", self._send, room=2, batch=1, refused=_refused)

    def move(self, done: int, total: int, note: str) -> None:
        self._pace.move(done, total)
        self._note = note or self._note
        if time.monotonic() - self._asked >= _EVERY:
            self._asked, self._wanted = time.monotonic(), True
            self._outbox.put(self._stage)

    def end(self, state: str) -> None:
        if self._wanted:
            self._state = state
            self._outbox.put(self._stage)
        with contextlib.suppress(*PROGRAMMING_ERRORS):  # it was a warning already
            self._outbox.close(_LAST_SECONDS)

    def _send(self, _: list[str]) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        done = self._pace.done / max(self._pace.total, 1)
        percent, text = 100.0 if self._state == "finished" else 100.0 * min(done, 1.0), self.description()
        if self._artifact is None:
            create = cast(Any, create_progress_artifact)
            key = f"progress-{self._stage}"
            self._artifact = self._context.run(create, percent, key=key, description=text, _sync=True)
        else:
            update = cast(Any, update_progress_artifact)
            self._context.run(update, self._artifact, percent, description=text, _sync=True)

    def description(self) -> str:
        """Position, speed, time left and the note, e.g. `1,000 of 5,000 images, 42/s, 2 min left, loss 0.310`."""
        pace = self._pace
        parts = [f"{pace.done:,} of {pace.total:,} images"]
        if pace.speed:
            parts.append(f"{pace.speed:,.3g}/s")
        if self._state != "running":
            parts.append(f"{self._state} after {duration(time.monotonic() - self._started)}")
        elif pace.seconds_left is not None:
            parts.append(f"{duration(pace.seconds_left)} left")
        return f"{self._stage}: " + ", ".join([*parts, self._note] if self._note else parts)


def duration(seconds: float) -> str:
    """Two digits that matter: `45 s`, `12 min`, `3 h 20 min`, `5 d 4 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _refused(error: Exception) -> bool:
    """A deleted artifact or a request the API does not take."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, ValueError) or (status is not None and 400 <= status < 500)
