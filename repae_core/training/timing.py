"""Time by phase of a step, without waiting for the device while the step runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """`with timer("vae"): ...` adds to a phase; phases are the same names in all steps.

    A phase inside another one counts only for itself. On a GPU the phases are marked by events, which are read (and
    waited for) only by `take`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block; it also appears under this name in torch.profiler."""
        outer = self._open[-1] if self._open else None
        self._open.append(phase)
        try:
            with torch.profiler.record_function(phase):
                if self._cuda:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    yield
                    end.record()
                    self._events.append((phase, outer, start, end))
                else:
                    began = time.perf_counter()
                    yield
                    self._add(phase, outer, time.perf_counter() - began)
        finally:
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; call it outside of all phases."""
        for phase, outer, start, end in self._events:
            end.synchronize()
            self._add(phase, outer, start.elapsed_time(end) / 1000)
        self._events.clear()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def _add(self, phase: str, outer: str | None, seconds: float) -> None:
        self._seconds[phase] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds
