"""Ends a worker whose step hangs, so that its supervisor can restart it from the last checkpoint."""

from __future__ import annotations

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

logger = logging.getLogger("repae_core")

MINIMUM_SECONDS = 120.0
FIRST_STEP_SECONDS = 600.0
MEDIANS = 10.0
_LAST_WORDS_SECONDS = 1.0
_EXIT_CODE = 70  # EX_SOFTWARE


def end_process() -> None:
    """Every thread's stack on stderr, then exit without waiting for the thread that hangs."""
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
    time.sleep(_LAST_WORDS_SECONDS)  # what was logged last may still be on its way to another process
    os._exit(_EXIT_CODE)


class StepWatchdog:
    """Calls `on_hang` when no step has ended for max(120 s, 10 x the median step), or for `timeout` s if given.

    minimum: seconds in place of the 120, where it is longer.

    The first step, which loads and connects, may take 600 s where the limit is shorter.
    """

    def __init__(
        self, timeout: float | None = None, on_hang: Callable[[], None] = end_process, *, minimum: float = 0.0
    ) -> None:
        self._timeout, self._on_hang = timeout, on_hang
        self._minimum = max(MINIMUM_SECONDS, minimum)
        self._durations: deque[float] = deque(maxlen=101)
        self._last, self._first = time.monotonic(), True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.alive()
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()

    def beat(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if not self._first:
            self._durations.append(now - self._last)
        self._last, self._first = now, False

    def alive(self) -> None:
        """The step under way still works."""
        self._last = time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds after which the step under way counts as hanging."""
        median = statistics.median(self._durations) if self._durations else 0.0
        limit = self._timeout or max(self._minimum, MEDIANS * median)
        return max(limit, FIRST_STEP_SECONDS) if self._first else limit

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.limit / 4)):
            if time.monotonic() - self._last > self.limit:
                logger.error("no step has ended for %.0f s: this worker hangs and is ended", self.limit)
                self._on_hang()
                return
