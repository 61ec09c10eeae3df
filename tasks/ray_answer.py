"""Waiting for what a Ray task returns, so that a cancel is heard meanwhile."""

from __future__ import annotations

import contextlib
import queue
from typing import Any


class Answer:
    """What a Ray reference will hold, waited for so that a cancel is heard.

    Ray's own waits look for signals themselves, and make a SystemError of the exception that a handler raises. In those
    of a `Future` it may leave a lock held, for which Ray's shutdown then waits for ever.
    """

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._arrived: list[Any] = []
        reference._on_completed(self._arrivals.put)

    def here(self, seconds: float = 0.0) -> bool:
        """Whether it has come; waits up to so many seconds."""
        if not self._arrived:
            with contextlib.suppress(queue.Empty):
                self._arrived.append(self._arrivals.get(timeout=seconds))
        return bool(self._arrived)

    def value(self) -> Any:
        """What has come; raised, if it is what the task has raised or Ray's own error."""
        import ray

        value = self._arrived[0]
        if isinstance(value, ray.exceptions.RayTaskError):
            raise value.as_instanceof_cause()
        if isinstance(value, ray.exceptions.RayError):
            raise value
        return value


def answer_of(reference: Any, seconds: float) -> Any:
    """`ray.get` in which a cancel is heard.

    Raises:
        TimeoutError: no answer within so many seconds.
    """
    answer = Answer(reference)
    if not answer.here(seconds):
        raise TimeoutError(f"no answer for {seconds:.0f} s")
    return answer.value()
