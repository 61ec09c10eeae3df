"""The loop around a training step: batches in order, logging, checkpoints, previews, exact resume.

Progress is counted in images seen; the batch, its draws and the learning rate are functions of (seed, images
seen), so a run that starts from a checkpoint continues as if it had not stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from repae_core.artifacts import Artifact
from repae_core.training.checkpoint import committed_checkpoints, load_checkpoint, save_checkpoint
from repae_core.training.state import LDMState, Metrics


@dataclass(frozen=True)
class Progress:
    """What a run reports on its way: position, speed, the metrics logged now, pictures written now."""

    step: int
    total_steps: int
    images_seen: int
    images_per_second: float
    metrics: dict[str, float] = field(default_factory=dict)
    previews: dict[str, str] = field(default_factory=dict)  # picture name -> file in the stage's folder


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class LoopSettings:
    """Intervals are in steps; 0 previews = none."""

    total_steps: int
    batch_size: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    preview_every: int


class TrainingLoop:
    """Runs `step(index, batch)` from the newest checkpoint of `folder` to the end.

    record: what a checkpoint keeps beside the state (model specs, threads); the metric history joins it.
    guard: called before each commit, raises when the stage's lease is lost.
    """

    def __init__(
        self,
        state: LDMState,
        folder: Artifact,
        settings: LoopSettings,
        *,
        record: dict[str, Any],
        report: Report,
        guard: Callable[[], None],
    ) -> None:
        self.state = state
        self.folder = folder
        self.settings = settings
        self.record = record
        self.report = report
        self.guard = guard
        self.history: list[dict[str, float]] = []
        self.start_step = 0

    def restore(self, source: Artifact | None = None) -> bool:
        """Continue from the newest committed checkpoint of `source` (default: this folder); False if it has none."""
        source = source or self.folder
        found = committed_checkpoints(source)
        if not found:
            return False
        record = load_checkpoint(source, found[-1], self.state)
        self.history = record["history"]
        self.start_step = record["images_seen"] // self.settings.batch_size
        return True

    def run(
        self,
        batches: Iterable[Any],
        step: Callable[[int, Any], Metrics],
        preview: Callable[[int], dict[str, str]] | None = None,
    ) -> None:
        """Train to `total_steps`; `batches` start at the step after the restored one."""
        s = self.settings
        started, last_report = time.monotonic(), time.monotonic()
        for index, batch in zip(range(self.start_step, s.total_steps), batches, strict=False):
            metrics = step(index, batch)
            done = index + 1
            last = done == s.total_steps
            logged = self._log(done, metrics) if done % s.log_every == 0 or last else {}
            pictures = preview(done) if preview and (last or (s.preview_every and done % s.preview_every == 0)) else {}
            if done % s.checkpoint_every == 0 or last:
                self._checkpoint(done)
            if logged or pictures or time.monotonic() - last_report > 2.0:
                last_report = time.monotonic()
                speed = (done - self.start_step) * s.batch_size / (last_report - started)
                self.report(Progress(done, s.total_steps, done * s.batch_size, speed, logged, pictures))

    def _log(self, done: int, metrics: Metrics) -> dict[str, float]:
        """The only place where metrics leave the device: one reduction over ranks, one copy."""
        values = self.state.group.mean(torch.stack([m.float() for m in metrics.values()])).tolist()
        logged = dict(zip(metrics, values, strict=True))
        self.history.append({"step": done, "images_seen": done * self.settings.batch_size, **logged})
        return logged

    def _checkpoint(self, done: int) -> None:
        record = self.record | {"images_seen": done * self.settings.batch_size, "history": self.history}
        save_checkpoint(self.folder, self.state, record, guard=self.guard, keep=self.settings.keep_checkpoints)
