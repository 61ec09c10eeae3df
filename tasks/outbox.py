"""A bounded queue with a thread that sends: who puts something in never waits for the service behind it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger("repae")

T = TypeVar("T")

PROGRAMMING_ERRORS = (TypeError, NameError, AttributeError, LookupError, AssertionError)
_FIRST_PAUSE = 1.0  # seconds before a failed batch is tried again, doubled up to _LONGEST_PAUSE
_LONGEST_PAUSE = 30.0


class Outbox(Generic[T]):
    """Items in order and in batches to `send`, by a thread that starts with the first item.

    what, where: for messages, e.g. "metrics", "MLflow at http://...".
    send: one batch. What it raises is trouble of the service: the batch is tried again, quietly, for as long as it
    takes. `refused` says which errors no repetition mends: that batch is left out with a warning. A programming error
    also leaves it out, and `close` raises the first one.
    room: items that may wait. A full outbox takes no more: those who put in keep the whole history elsewhere and may
    bring an item again, which is simpler to get right than finding out what was thrown away among the old.
    gather: seconds for which items are collected after a batch.
    """

    def __init__(
        self,
        what: str,
        where: str,
        send: Callable[[list[T]], None],
        *,
        room: int,
        batch: int,
        refused: Callable[[Exception], bool] = lambda error: False,
        gather: float = 0.0,
    ) -> None:
        self._what, self._where, self._send, self._refused = what, where, send, refused
        self._room, self._batch, self._gather = room, batch, gather
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._hurried = self._ended = self._away = False
        self._left_out = 0
        self._error: Exception | None = None

    def put(self, item: T) -> bool:
        """Leave an item to be sent; False if there is no room (or the outbox is closed)."""
        with self._changed:
            if self._ended or len(self._items) >= self._room:
                return False
            self._items.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"outbox-{self._what}", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return True

    def flush(self, seconds: float) -> bool:
        """Wait until everything is sent, at most so long; whether it is."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._items, seconds)
            self._hurried = False
            return done

    def close(self, seconds: float) -> int:
        """Flush within so many seconds and end; the number of items that did not arrive, also said in a warning.

        Raises:
            TypeError, LookupError, ...: the first programming error of `send`.
        """
        self.flush(seconds)
        with self._changed:
            self._ended = True
            lost = len(self._items) + self._left_out
            self._items.clear()
            self._changed.notify_all()
        if lost:
            logger.warning("%d %s did not arrive at %s", lost, self._what, self._where)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return lost

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while batch := self._next():
            try:
                self._send(batch)
            except Exception as error:
                if isinstance(error, PROGRAMMING_ERRORS) or self._refused(error):
                    self._leave_out(batch, error)
                    continue
                self._note_away(error)
                self._rest(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                pause = _FIRST_PAUSE
                self._note_back()
                self._remove(batch)
                self._rest(self._gather)

    def _next(self) -> list[T]:
        """The oldest items, which stay in the queue until they are sent; none when it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            return [self._items[index] for index in range(min(self._batch, len(self._items)))]

    def _remove(self, batch: list[T]) -> None:
        with self._changed:
            for _ in range(min(len(batch), len(self._items))):  # `close` may have cleared it meanwhile
                self._items.popleft()
            self._changed.notify_all()

    def _rest(self, seconds: float) -> None:
        """Wait, but not while somebody waits for the queue to be empty (then a second, if the service is away)."""
        with self._changed:
            until = time.monotonic() + seconds
            self._changed.wait_for(lambda: self._ended or self._hurried, seconds)
            if self._hurried and self._away:
                left = min(until - time.monotonic(), 1.0)
                self._changed.wait_for(lambda: self._ended, max(left, 0.0))

    def _leave_out(self, batch: list[T], error: Exception) -> None:
        if not self._left_out:  # the others are counted at the end
            logger.warning("%s refused %s: %s", self._where, self._what, _line(error))
        if isinstance(error, PROGRAMMING_ERRORS):
            self._error = self._error or error
        self._left_out += len(batch)
        self._remove(batch)

    def _note_away(self, error: Exception) -> None:
        if not self._away:
            logger.warning("%s takes no %s (%s); trying again", self._where, self._what, _line(error))
        self._away = True

    def _note_back(self) -> None:
        if self._away:
            logger.warning("%s takes %s again", self._where, self._what)
        self._away = False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
