"""How fast a stage goes, and how long it still takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Pace:
    """Speed since the first position that was seen: a run that continues starts in the middle."""

    done: int = 0
    total: int = 0
    _first: tuple[int, float] | None = field(default=None, repr=False)
    _last: float = field(default=0.0, repr=False)

    def move(self, done: int, total: int) -> None:
        """Note a new position."""
        self.done, self.total, self._last = done, total, time.monotonic()
        if self._first is None:
            self._first = (done, self._last)

    @property
    def speed(self) -> float:
        """Units a second; 0 while unknown."""
        if self._first is None or self._last <= self._first[1]:
            return 0.0
        return max(self.done - self._first[0], 0) / (self._last - self._first[1])

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at this speed; None while unknown."""
        return (self.total - self.done) / self.speed if self.speed else None
