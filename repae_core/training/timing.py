"""Time by phase of a step, without waiting for the device while the step runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """`with timer("vae"): ...` adds to a phase; phases are the same names in all steps.

    On a GPU the phases are marked by events, which are read (and waited for) only by `take`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block; it also appears under this name in torch.profiler."""
        with torch.profiler.record_function(phase):
            if self._cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                yield
                end.record()
                self._events.append((phase, start, end))
            else:
                began = time.perf_counter()
                yield
                self._seconds[phase] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        for phase, start, end in self._events:
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
        self._events.clear()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
