"""The loop around a training step: batches in order, logging, checkpoints, previews, exact resume.

Progress is counted in images seen; the batch, its draws and the learning rate are functions of (seed, images
seen), so a run that starts from a checkpoint continues as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import committed_checkpoints, require_steps_left
from repae_core.artifacts.history import PERFORMANCE, as_lines, read_rows
from repae_core.training.checkpoint import load_checkpoint
from repae_core.training.checkpoint_writer import CheckpointWriter
from repae_core.training.precision import at_step, largest_norms, require_finite_gradients
from repae_core.training.state import LDMState, Metrics
from repae_core.training.throughput import ThroughputMeter
from repae_core.training.watchdog import StepWatchdog

logger = logging.getLogger("repae_core")

_AFTER_STORE_SECONDS = 60.0  # to write what waited


@dataclass(frozen=True)
class Progress:
    """What a run reports on its way: position, speed, the metrics logged now, pictures written now.

    history: once, when a run continues: every row logged before, for those who have missed some.
    performance: with metrics only: what ThroughputMeter.read gives, `seconds/<phase>` of a step (mean since the last
    report of metrics), and `checkpoint_seconds` that training has lost since it started or continued.
    """

    step: int
    total_steps: int
    images_seen: int
    metrics: dict[str, float] = field(default_factory=dict)
    previews: dict[str, str] = field(default_factory=dict)  # picture name -> file in the stage's folder
    performance: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class LoopSettings:
    """Intervals are in steps; 0 previews or kept checkpoints = none.

    fixed: settings that a checkpoint is continued only with as it was written: those that decide how sums round
    (micro-batches, compilation), where the VAE's warm-up ends, and the batch size, by which steps are counted.
    step_timeout: seconds after which a step counts as hanging and ends the process; None = never, 0 = max(120 s,
    store_retry_seconds + 60 s, 10 x median).
    """

    total_steps: int
    batch_size: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    preview_every: int
    keep_checkpoints_every: int = 0
    checkpoint_queue: int = 2
    fixed: dict[str, Any] = field(default_factory=dict)
    step_timeout: float | None = None


class TrainingLoop:
    """Runs `step(index, batch)` from the newest checkpoint of `folder` to the end.

    record: what a checkpoint keeps beside the state (model specs, threads); the metric history joins it.
    guard: called before each commit, raises when the stage's lease is lost. preempted: asked after each step, by
    all ranks and with one answer; a True after a False makes a checkpoint at once. training: see CheckpointWriter.
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
        preempted: Callable[[], bool] = lambda: False,
        training: str = "",
    ) -> None:
        self.state = state
        self.folder = folder
        self.settings = settings
        self.record = record | settings.fixed
        self.report = report
        self.guard = guard
        self.preempted = preempted
        self.training = training
        self.history: list[dict[str, float]] = []
        self.performance: list[dict[str, float]] = []  # beside the checkpoints, which are the same in every run
        self.start_step = 0
        self.watchdog: StepWatchdog | None = None

    def restore(self, source: Artifact | None = None) -> bool:
        """Continue from the newest committed checkpoint of `source` (default: this folder); False if it has none.

        Raises:
            ValueError: it does not fit this run: workers, micro-batches, batch size, or nothing left to train.
        """
        origin, group = source or self.folder, self.state.group
        if source is None:
            with self._writer() as writer:  # which adopts what had waited when a process was killed
                writer.flush()
        newest = torch.tensor([max(committed_checkpoints(origin), default=0)], device=group.device)
        seen = int(group.gather(newest)[0])  # the main rank's: listings of one store may differ for a moment
        if not seen:
            return False
        s = self.settings
        require_steps_left(origin, seen, steps=s.total_steps, batch_size=s.batch_size, another=source is not None)
        record = load_checkpoint(origin, seen, self.state, fixed=s.fixed)
        self.history = record["history"]
        self.start_step = record["images_seen"] // s.batch_size
        if source is None and group.is_main:
            self.performance = [row for row in read_rows(self.folder, PERFORMANCE) if row["images_seen"] <= seen]
        logger.info("continued from checkpoint %d of %s", seen, origin.uri)
        self.report(Progress(self.start_step, s.total_steps, seen, history=self.history + self.performance))
        return True

    def run(
        self,
        batches: Iterable[Any],
        step: Callable[[int, Any], Metrics],
        preview: Callable[[int], dict[str, bytes]] | None = None,
        meter: ThroughputMeter | None = None,
    ) -> None:
        """Train to `total_steps`; `batches` start at the step after the restored one.

        meter: the main rank's, told of every step.

        Raises:
            StoreError: a checkpoint could not be written within the store's time budget.
            NonFiniteLossError: a gradient of a step whose weights are to be kept was NaN or infinite.
        """
        s = self.settings
        last_report, announced = time.monotonic(), False
        norms: Metrics = {}
        with self._watchdog(), self._writer() as writer:
            for index, batch in zip(range(self.start_step, s.total_steps), self._timed(batches), strict=False):
                done = index + 1
                with at_step(done):
                    metrics = step(index, batch)
                norms = largest_norms(norms, metrics)
                last = done == s.total_steps
                if meter:
                    meter.mark(done)
                log = done % s.log_every == 0 or last
                progress = self._progress(done, metrics if log else {}, writer.seconds, meter)
                due = s.preview_every and (last or done % s.preview_every == 0)
                if preview and due:
                    self._send_pictures(writer, done, preview)
                before, announced = announced, self.preempted()
                leaving = announced and not before
                if leaving or done % s.checkpoint_every == 0 or last:
                    self._save(writer, done, norms)
                    norms = {}
                if leaving:
                    logger.warning("this machine is about to be taken away: checkpoint at step %d", done)
                    writer.flush()
                writer.check()
                if self.watchdog:
                    self.watchdog.beat()
                self._report_written(writer)
                if progress.metrics or time.monotonic() - last_report > 2.0:
                    last_report = time.monotonic()
                    with self.state.timer("logging"):
                        self.report(progress)
        self._report_written(writer)
        if self.state.group.is_main and self.start_step < s.total_steps:
            logger.info("%.1f s lost to checkpoints", writer.seconds)

    def _writer(self) -> CheckpointWriter:
        s = self.settings
        return CheckpointWriter(
            self.folder,
            self.state,
            guard=self.guard,
            waits=self.alive,
            training=self.training,
            keep=s.keep_checkpoints,
            keep_every=s.keep_checkpoints_every * s.batch_size,
            waiting=s.checkpoint_queue,
        )

    def _save(self, writer: CheckpointWriter, done: int, norms: Metrics) -> None:
        """What was measured goes first: a run that continues knows it up to its checkpoint."""
        with at_step(done):
            require_finite_gradients(norms, self.state.networks())
        writer.write({PERFORMANCE: as_lines(self.performance)})
        writer.save(self.record | {"images_seen": done * self.settings.batch_size, "history": self.history})

    def _send_pictures(self, writer: CheckpointWriter, done: int, preview: Callable[[int], dict[str, bytes]]) -> None:
        """Written in the background, before any later checkpoint: a run that continues has lost none."""
        with self.state.timer("preview"):
            pictures = preview(done)
        images = done * self.settings.batch_size
        files = {name: f"previews/{images:09d}-{name}.png" for name in pictures}
        progress = Progress(done, self.settings.total_steps, images, previews=files)
        writer.write({files[name]: content for name, content in pictures.items()}, progress)

    def _report_written(self, writer: CheckpointWriter) -> None:
        for progress in writer.take_receipts():
            self.report(progress)

    def alive(self) -> None:
        """A step that takes long on purpose goes on."""
        if self.watchdog:
            self.watchdog.alive()

    @contextlib.contextmanager
    def _watchdog(self) -> Iterator[None]:
        """Patient enough for a step that waits, on this rank or another, until the store can be read again."""
        if self.settings.step_timeout is None:
            yield
            return
        patience = self.folder.store.retry_seconds + _AFTER_STORE_SECONDS
        with StepWatchdog(self.settings.step_timeout or None, minimum=patience) as self.watchdog:
            yield

    def _timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, with the time spent on waiting for them."""
        source = iter(batches)
        while True:
            with self.state.timer("data"):
                batch = next(source, None)
            if batch is None:
                return
            yield batch

    def _log(self, done: int, metrics: Metrics) -> dict[str, float]:
        """The only place where metrics leave the device: one reduction over ranks, one copy.

        Losses are finite; the norm of an overflow in fp16 is not, and is left out: JSON has no number for it.
        """
        with self.state.timer("logging"):
            values = self.state.group.mean(torch.stack([m.float() for m in metrics.values()])).tolist()
        logged = {name: value for name, value in zip(metrics, values, strict=True) if math.isfinite(value)}
        self.history.append({"step": done, "images_seen": done * self.settings.batch_size, **logged})
        return logged

    def _progress(
        self, done: int, metrics: Metrics, checkpoint_seconds: float, meter: ThroughputMeter | None
    ) -> Progress:
        """Position; with metrics also their values and what was measured, which join the rows kept."""
        s = self.settings
        progress = Progress(done, s.total_steps, done * s.batch_size)
        if not metrics:
            return progress
        logged = self._log(done, metrics)
        steps = min((done - 1) % s.log_every + 1, done - self.start_step)
        phases = {f"seconds/{phase}": seconds / steps for phase, seconds in self.state.timer.take().items()}
        measured = (meter.read() if meter else {}) | phases | {"checkpoint_seconds": checkpoint_seconds}
        self.performance.append({"step": done, "images_seen": progress.images_seen, **measured})
        return dataclasses.replace(progress, metrics=logged, performance=measured)
